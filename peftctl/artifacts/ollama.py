"""Ollama's Modelfile: which TEMPLATE writes exactly what the model was trained on, found by rendering both ways.

Ollama renders conversations with a Go template, transformers with a Jinja template; nothing translates one into the
other. So a table holds Go templates of the known families (ollama_families.py). Conversations are rendered with each
and with the tokenizer's own, and the family that agrees on all of them, text and token ids, is taken. Where none does,
nothing is written.

Format: https://docs.ollama.com/modelfile. Messages are compared as they are: a Jinja template that strips white space
around them does so in transformers only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from peftctl.artifacts.gotemplate import Message, Template
from peftctl.artifacts.ollama_families import FAMILIES, LAST, Family
from peftctl.data import templates
from peftctl.data.formats import Example
from peftctl.data.prompts import generation_prompt
from peftctl.errors import UsageError
from peftctl.recipe.schema import DataSection

_ASKED = ("Which tea is it?", 'A list:\n- "one" {two}\n\n- trois, четыре', "And then?")
_SAID = ("Green tea.", "First line\nsecond {{ line }}")
_SYSTEM = {"role": "system", "content": "Answer in one word.\nBe kind."}
_NO_SYSTEM = "the model's chat template refuses system messages; Ollama will leave them out without saying so"
_PLAIN = DataSection(train="", format="prompt_completion", template="{prompt}")


def _conversation(turns: int) -> list[Message]:
    """Return `turns` questions, all but the last answered."""
    messages: list[Message] = [{"role": "user", "content": _ASKED[0]}]
    for answer, question in zip(_SAID[: turns - 1], _ASKED[1:turns], strict=True):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
    return messages


CONVERSATIONS: list[list[Message]] = [*map(_conversation, (1, 2, 3)), [{"role": "user", "content": _ASKED[1]}]]
WITH_SYSTEM: list[list[Message]] = [[_SYSTEM, *conversation] for conversation in CONVERSATIONS]


@dataclass(frozen=True)
class Choice:
    """What a Modelfile says of conversations.

    Args:
        family: Its name, or `plain`.
        template: Go template.
        stop: Texts at which an answer ends.
        system: The system message that the tokenizer's template inserts by itself; empty where it inserts none.
        bos: Whether Ollama must put the BOS before the text, because the template does not write it.
        notices: What the user should know.
    """

    family: str
    template: str
    stop: tuple[str, ...]
    system: str = ""
    bos: bool = False
    notices: tuple[str, ...] = ()


def choose(tokenizer: Any, template: str, target: str) -> Choice:
    """Find the Go template that writes what a model was trained on.

    Args:
        tokenizer: Its tokenizer.
        template: `data.template` of the run.
        target: For messages.

    Raises:
        UsageError: No template of the table does.
    """
    if template == templates.CHAT and tokenizer.chat_template:
        return _choose_family(tokenizer, target)
    return _plain(tokenizer, template if template != templates.CHAT else "{prompt}", target)


def modelfile(choice: Choice, *, context: int | None, adapter: bool, license: str | None) -> str:
    """Return the Modelfile of a folder with model/, and adapter/ where the adapter is not merged.

    Args:
        choice: How conversations are written.
        context: Positions to reserve; None leaves it to Ollama.
        adapter: Whether there is adapter/.
        license: Of the base.
    """
    lines = ["# ollama create NAME -f Modelfile", "FROM ./model"]
    lines += ["ADAPTER ./adapter"] if adapter else []
    lines += [f"TEMPLATE {_quoted(choice.template)}"]
    lines += [f"SYSTEM {_quoted(choice.system)}"] if choice.system else []
    lines += [f'PARAMETER stop "{stop}"' for stop in choice.stop]
    lines += [f"PARAMETER num_ctx {context}"] if context else []
    lines += [f"LICENSE {_quoted(license)}"] if license else []
    return "\n".join(lines) + "\n"


def _choose_family(tokenizer: Any, target: str) -> Choice:
    expected = [(messages, _rendered(tokenizer, messages, target)) for messages in CONVERSATIONS]
    with_system: list[tuple[list[Message], str]] = []
    refusal = None
    for messages in WITH_SYSTEM:
        try:
            with_system.append((messages, _rendered(tokenizer, messages, target)))
        except UsageError as error:
            refusal = error
    if refusal is not None and with_system:
        raise refusal
    differences = []
    for family, text in _candidates(tokenizer):
        candidate = Template(text)
        system = _own_system(candidate, expected[0])
        found = _first_difference(candidate, system, expected + with_system)
        if found is None:
            notices = () if refusal is None else (_NO_SYSTEM,)
            choice = Choice(family.name, text, family.stop, system, notices=notices)
            _compare_ids(tokenizer, choice, target)
            return choice
        differences.append((found, family.name))
    (_, _, message), name = max(differences, key=lambda entry: entry[0][:2])
    known = ", ".join(family.name for family in FAMILIES)
    raise UsageError(
        f"{target}: no known template ({known}) writes conversations as its chat template does; the nearest, {name}, "
        f"differs: {message}; write the TEMPLATE of an Ollama Modelfile for `--format hf --merged` yourself"
    )


def _candidates(tokenizer: Any) -> Iterator[tuple[Family, str]]:
    """Yield every family as it is, then behind the tokenizer's BOS."""
    yield from ((family, family.template) for family in FAMILIES)
    if tokenizer.bos_token:
        yield from ((family, tokenizer.bos_token + family.template) for family in FAMILIES)


def _own_system(candidate: Template, example: tuple[list[Message], str]) -> str:
    """Return the system message that a chat template must have inserted if it is the candidate's family; else ''."""
    messages, text = example
    before, _, after = candidate.render(messages, system="\0").partition("\0")
    if text == candidate.render(messages) or not (text.startswith(before) and text.endswith(after)):
        return ""
    return text[len(before) : len(text) - len(after)]


def _first_difference(
    candidate: Template, system: str, expected: Sequence[tuple[list[Message], str]]
) -> tuple[int, int, str] | None:
    """Return how many conversations agree, how many characters of the next, and what is different there."""
    for agreed, (messages, text) in enumerate(expected):
        ours = candidate.render(messages, system)
        if ours != text:
            at = next((i for i in range(min(len(ours), len(text))) if ours[i] != text[i]), min(len(ours), len(text)))
            want, got = (repr(side[max(0, at - 10) : at + 30]) for side in (text, ours))
            return agreed, at, f"in {_roles(messages)}, character {at}: expected {want}, it writes {got}"
    return None


def _roles(messages: Sequence[Message]) -> str:
    return "a conversation of " + ", ".join(message["role"] for message in messages)


def _rendered(tokenizer: Any, messages: Sequence[Message], target: str) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{target}: its chat template refuses {_roles(messages)}: {reason}") from error


def _compare_ids(tokenizer: Any, choice: Choice, target: str) -> None:
    """Compare token ids too: they are what the model sees."""
    candidate = Template(choice.template)
    for messages in CONVERSATIONS:
        ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)["input_ids"]
        ours = tokenizer(candidate.render(messages, choice.system), add_special_tokens=False)["input_ids"]
        if list(ids) != list(ours):
            raise UsageError(f"{target}: the template {choice.family} writes the same text but other tokens")


def _plain(tokenizer: Any, template: str, target: str) -> Choice:
    """Return the template that frames the last message alone, as a model without turns was trained."""
    frame = templates.frame(template)
    before, _, after = frame("\0").partition("\0")
    if any(braces in piece for piece in (before, after) for braces in ("{{", "}}")):
        raise UsageError(f"{target}: data.template writes {{{{ or }}}}, which a Modelfile can't hold")
    last = f'{{{{ if and (eq .Role "user") {LAST} }}}}{before}{{{{ .Content }}}}{after}{{{{ end }}}}'
    candidate = Template(f"{{{{ range $i, $m := .Messages }}}}{last}{{{{ end }}}}")
    opening: list[int] = []
    for messages in (*CONVERSATIONS, *WITH_SYSTEM):
        example = Example("this message", prompt=frame(messages[-1]["content"]), completion="?")
        expected, _ = generation_prompt(example, tokenizer, _PLAIN)
        ours = tokenizer(candidate.render(messages), add_special_tokens=False)["input_ids"]
        opening = [tokenizer.bos_token_id] if len(expected) > len(ours) else []
        if list(expected) != [*opening, *ours]:
            raise UsageError(f"{target}: data.template can't be written for Ollama: its tokens come out differently")
    notice = "the model was trained on single requests in a plain template: system and earlier messages are left out"
    stop = (str(tokenizer.eos_token),) if tokenizer.eos_token else ()
    return Choice("plain", candidate.text, stop, bos=bool(opening), notices=(notice,))


def _quoted(text: str) -> str:
    if '"""' in text:
        raise UsageError(
            'a template or a system message holds """, which a Modelfile can\'t; remove it from the template'
        )
    return f'"""{text}"""'
