"""Rows of a file -> examples: fields renamed, present, and of the right type; nothing rendered or tokenised yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peftctl.data import templates
from peftctl.data.conversations import Message, read_messages, read_sharegpt, read_tools
from peftctl.data.problems import Problems, kind, wrong
from peftctl.data.sources import Row
from peftctl.errors import DataError, did_you_mean
from peftctl.recipe.schema import DataSection

__all__ = ["Example", "Message", "section_of", "to_examples"]

_FIELDS = {
    "messages": ("messages", "tools", "role", "content", "train"),
    "sharegpt": ("conversations", "tools", "system", "from", "value", "train"),
    "alpaca": ("instruction", "input", "output", "system", "wrong_answers"),
    "prompt_completion": ("prompt", "completion", "wrong_answers"),
    "text": ("text",),
    "labelled_text": ("text", "label"),
    "tokens_tags": ("tokens", "tags"),
}


@dataclass(frozen=True)
class Example:
    """One row, ready to be rendered. Exactly one of messages, prompt, text and tokens is set.

    Args:
        where: Place of the row.
        messages: A conversation, for the tokenizer's chat template.
        tools: JSON schemas of the tools that are offered in it.
        prompt: Text before the answer, its plain template already filled in.
        completion: The answer to `prompt`.
        text: Whole text.
        label: Class of `text`.
        tokens: Words.
        tags: Their tags, as many.
        source: Which entry of `data.sources` it comes from, from 0; None where there are none.
        wrong_answers: Answers to the same prompt that are not right, for losses that compare them.
    """

    where: str
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    label: str | int | None = None
    tokens: list[str] | None = None
    tags: list[str | int] | None = None
    source: int | None = None
    wrong_answers: tuple[str, ...] = ()


def section_of(data: DataSection, source: int | None) -> DataSection:
    """Return the section as an entry of `data.sources` sees it: with its own format and columns, where it has some."""
    if source is None or data.sources is None:
        return data
    own = data.sources[source]
    update = {
        "format": own.format or data.format,
        "columns": data.columns if own.columns is None else own.columns,
    }
    return data.model_copy(update=update)


def to_examples(rows: Sequence[Row], data: DataSection, source: int | None = None) -> list[Example]:
    """Return one example a row.

    Args:
        rows: Of one layout.
        data: The section, as `section_of` gives it.
        source: Which entry of `data.sources` the rows come from.

    Raises:
        DataError: A field is missing or has the wrong type, or `data.columns` and `data.template` don't fit the
            format; up to ten problems are named, the others counted.
    """
    _check_section(data)
    read = _READERS[data.format]
    problems = Problems()
    examples = []
    for row in rows:
        try:
            examples.append(replace(read(_Fields(row, data, source), data), source=source))
        except DataError as error:
            problems.extend(error.problems)
    problems.raise_if_any()
    return examples


class _Fields:
    """The fields of one row under our names."""

    def __init__(self, row: Row, data: DataSection, source: int | None = None):
        self.where = row.where
        self.row = row.fields
        self.columns = data.columns
        self.source = source

    def required(self, name: str) -> Any:
        theirs = self.columns.get(name, name)
        if theirs not in self.row:
            key = "data.columns" if self.source is None else f"data.sources[{self.source}].columns"
            mapped = f" ({key} maps {name} to it)" if theirs != name else ""
            raise wrong(
                self.where,
                f"field '{theirs}' is missing{mapped}; the row has: {', '.join(map(str, self.row))}",
                "" if mapped else f"map it with {key} {{{name}: ...}}",
            )
        return self.row[theirs]

    def optional(self, name: str) -> Any:
        return self.row.get(self.columns.get(name, name))

    def text(self, name: str) -> str:
        value = self.required(name)
        if not isinstance(value, str):
            raise wrong(self.where, f"field '{self.columns.get(name, name)}': expected text, got {kind(value)}")
        return value

    def answer(self, name: str) -> str:
        """Text, where null means that there is no answer; such rows are dropped and counted when they are encoded."""
        return "" if self.required(name) is None else self.text(name)

    def optional_text(self, name: str) -> str:
        return "" if self.optional(name) is None else self.text(name)

    def wrong_answers(self, right: str) -> tuple[str, ...]:
        """One text or a list of texts; none where the row has no such field."""
        name, value = self.columns.get("wrong_answers", "wrong_answers"), self.optional("wrong_answers")
        answers = [value] if isinstance(value, str) else value or []
        if not isinstance(answers, list) or not all(isinstance(answer, str) and answer.strip() for answer in answers):
            raise wrong(self.where, f"field '{name}': expected text or a list of texts, got {kind(value)}")
        if right in answers:
            raise wrong(self.where, f"field '{name}': has the right answer among the wrong ones", "take it out")
        return tuple(answers)

    def named(self) -> dict[str, Any]:
        """All fields, those of `data.columns` under our names too."""
        renamed = {ours: self.row[theirs] for ours, theirs in self.columns.items() if theirs in self.row}
        return {**self.row, **renamed}


def _check_section(data: DataSection) -> None:
    problems = Problems()
    if not templates.is_plain(data.template):
        for name in data.columns:
            if name not in _FIELDS[data.format]:
                hint = did_you_mean(name, _FIELDS[data.format])
                problems.add(f"data.columns.{name}", f"format {data.format} has no such field", hint)
    if data.template != templates.CHAT and data.format not in ("alpaca", "prompt_completion"):
        problems.add("data.template", f"format {data.format} takes no template, got {data.template!r}", "remove it")
    problems.raise_if_any()
    if templates.is_plain(data.template):
        templates.check(data.template, answer="output" if data.format == "alpaca" else "completion")


def _messages(fields: _Fields, data: DataSection) -> Example:
    messages = read_messages(fields.required("messages"), fields.where, data.columns)
    return Example(fields.where, messages=messages, tools=read_tools(fields.optional("tools"), fields.where))


def _sharegpt(fields: _Fields, data: DataSection) -> Example:
    messages = read_sharegpt(fields.required("conversations"), fields.where, data.columns)
    system = fields.optional_text("system")
    if system:
        messages.insert(0, Message("system", system))
    return Example(fields.where, messages=messages, tools=read_tools(fields.optional("tools"), fields.where))


def _alpaca(fields: _Fields, data: DataSection) -> Example:
    instruction, context = fields.text("instruction"), fields.optional_text("input")
    output, system = fields.answer("output"), fields.optional_text("system")
    others = fields.wrong_answers(output)
    if data.template == templates.CHAT:
        question = f"{instruction}\n\n{context}" if context else instruction
        return Example(fields.where, messages=_one_turn(question, output, system), wrong_answers=others)
    if data.template == templates.ALPACA:
        prompt = templates.alpaca_prompt(instruction, context)
    else:
        known = {"input": "", "system": "", **{name: v for name, v in fields.named().items() if v is not None}}
        prompt = templates.fill(data.template, known, fields.where)
    return Example(fields.where, prompt=prompt, completion=output, wrong_answers=others)


def _prompt_completion(fields: _Fields, data: DataSection) -> Example:
    if templates.is_plain(data.template):
        completion = fields.answer("completion")
        prompt = templates.fill(data.template, fields.named(), fields.where)
        return Example(
            fields.where, prompt=prompt, completion=completion, wrong_answers=fields.wrong_answers(completion)
        )
    question, completion = fields.text("prompt"), fields.answer("completion")
    others = fields.wrong_answers(completion)
    if data.template == templates.CHAT:
        return Example(fields.where, messages=_one_turn(question, completion), wrong_answers=others)
    prompt = templates.alpaca_prompt(question)
    return Example(fields.where, prompt=prompt, completion=completion, wrong_answers=others)


def _one_turn(question: str, answer: str, system: str = "") -> list[Message]:
    first = [Message("system", system)] if system else []
    return [*first, Message("user", question), Message("assistant", answer)]


def _text(fields: _Fields, data: DataSection) -> Example:
    return Example(fields.where, text=fields.answer("text"))


def _labelled_text(fields: _Fields, data: DataSection) -> Example:
    label = fields.required("label")
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise wrong(fields.where, f"field 'label': expected text or a whole number, got {kind(label)}")
    return Example(fields.where, text=fields.text("text"), label=label)


def _tokens_tags(fields: _Fields, data: DataSection) -> Example:
    tokens, tags = fields.required("tokens"), fields.required("tags")
    for name, value, types in (("tokens", tokens, str), ("tags", tags, str | int)):
        if not isinstance(value, list) or not all(isinstance(item, types) for item in value):
            raise wrong(fields.where, f"field '{name}': expected a list of {name}, got {kind(value)}")
    if len(tokens) != len(tags):
        raise wrong(fields.where, f"expected as many tags as tokens, got {len(tokens)} tokens and {len(tags)} tags")
    return Example(fields.where, tokens=tokens, tags=tags)


_READERS: dict[str, Callable[[_Fields, DataSection], Example]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _text,
    "labelled_text": _labelled_text,
    "tokens_tags": _tokens_tags,
}
