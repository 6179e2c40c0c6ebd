"""Where the vectors of a prompt stand in a row: placeholder tokens in the tokenizer, and in what templates write.

Placeholder i of n is the token <|Pi|>, i from 1. A chat template is made to write them; a template of the recipe's own
has them in its text. The tokenizer is saved with the artefact, so whoever renders a row with it has them in place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from peftctl.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peftctl.data.formats import Example
    from peftctl.recipe.schema import Recipe

ORDER = ("front", "before_request", "after_request", "before_answer")
KEY = "method.positions"
_WRITTEN = re.compile(r"<\|P\d+\|>")


def placeholder(number: int) -> str:
    """Return the token of a vector, counted from 1."""
    return f"<|P{number}|>"


def add_placeholders(
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    positions: Mapping[str, int] | None,
    examples: Sequence[Example],
    recipe: Recipe,
) -> int:
    """Teach a tokenizer n placeholders, and its chat template where they stand; return the id of the first.

    Args:
        tokenizer: Changed in place.
        n: How many there are.
        positions: Place -> how many of them stand there; None where `data.template` has them in its text.
        examples: Training rows, before they are encoded.
        recipe: Of the run.

    Raises:
        UsageError: The template does not have each of them, or rows have what looks like one.
    """
    _refuse(recipe)
    if positions is None:
        _refuse_other_template(recipe.data.template, n)
    elif recipe.data.template != "chat":
        raise UsageError(
            f"{KEY}: places are those of a chat template, and data.template is '{recipe.data.template}'; write "
            f"{placeholder(1)} to {placeholder(n)} into the template where they are to stand, and set it to template"
        )
    _refuse_rows(examples, 0 if positions is not None else len(_WRITTEN.findall(recipe.data.template)))
    first = _add(tokenizer, n)
    if positions is not None:
        _write_into(tokenizer, positions, recipe)
    return first


def embedding_name(model: PreTrainedModel) -> str:
    """Return the name of the embedding that reads rows: of an encoder-decoder, the encoder's.

    Raises:
        UsageError: peft can't find it there, as another part of the model has the same module.
    """
    owner = model.get_encoder() if model.config.is_encoder_decoder else model
    embedding = owner.get_input_embeddings()  # type: ignore[union-attr]
    name = next(name for name, module in model.named_modules() if module is embedding)
    shared = [other for other, module in model.named_modules(remove_duplicate=False) if module is embedding]
    if len(shared) > 1:
        raise UsageError(
            f"{KEY}: the {model.config.model_type} architecture reads rows and answers with one embedding, "
            f"{' and '.join(shared)}; remove it, so that all vectors stand before the row"
        )
    return name


def _refuse(recipe: Recipe) -> None:
    if recipe.data.loss_on == "all":
        raise UsageError(f"{KEY}: data.loss_on: all would train on the placeholders; set it to completion")
    if recipe.model.adapters:
        raise UsageError(f"{KEY}: not on top of model.adapters; merge them first, and take the result as the base")


def _refuse_other_template(template: str, n: int) -> None:
    missing = [placeholder(i) for i in range(1, n + 1) if placeholder(i) not in template]
    if missing:
        raise UsageError(
            f"data.template: lacks {missing[0]} ({len(missing)} of {n} placeholders); {KEY} is template, so write "
            f"{placeholder(1)} to {placeholder(n)} where the vectors are to stand"
        )
    if placeholder(n + 1) in template:
        raise UsageError(f"data.template: has {placeholder(n + 1)}, and method.num_virtual_tokens is {n}; make it more")


def _refuse_rows(examples: Sequence[Example], in_template: int) -> None:
    """Raise where a row has what looks like a placeholder, beyond those that its template has written."""
    for example in examples:
        texts = [example.text, example.completion, *(message.content for message in example.messages or ())]
        found = sum(len(_WRITTEN.findall(text)) for text in (example.prompt, *texts) if text)
        if found != (in_template if example.prompt is not None else 0):
            raise UsageError(f"{example.where}: has the text of a placeholder, as {placeholder(1)} is; take it out")


def _add(tokenizer: PreTrainedTokenizerBase, n: int) -> int:
    from tokenizers import AddedToken

    names = [placeholder(i) for i in range(1, n + 1)]
    known = set(names) & tokenizer.get_vocab().keys()
    if known:
        raise UsageError(
            f"{KEY}: this model's tokenizer has {min(known)} already, as the base of an earlier run with "
            "positions; take the base that it was made from"
        )
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=True) for name in names], special_tokens=True)
    ids = [int(tokenizer.convert_tokens_to_ids(name)) for name in names]  # type: ignore[arg-type]
    if ids != list(range(ids[0], ids[0] + n)) or tokenizer("".join(names), add_special_tokens=False).input_ids != ids:
        raise UsageError(f"{KEY}: this model's tokenizer does not take {names[0]} as one token; remove the key")
    return ids[0]


def _write_into(tokenizer: PreTrainedTokenizerBase, positions: Mapping[str, int], recipe: Recipe) -> None:
    original = tokenizer.chat_template
    if not isinstance(original, str):
        raise UsageError(f"{KEY}: places need a tokenizer with one chat template; set it to template and write one")
    tokenizer.chat_template = with_places(original, positions)
    _refuse_lost_places(tokenizer, positions)


def with_places(original: str, positions: Mapping[str, int]) -> str:
    """Return a chat template that writes the placeholders, numbered in the order in which they stand in a request."""
    numbers = iter(range(1, sum(positions.values()) + 1))
    texts = {place: "".join(_texts(numbers, positions.get(place, 0))) for place in ORDER}
    front, before, after, answer = (json.dumps(texts[place]) for place in ORDER)
    turns = (
        "{%- set places = namespace(turns=[]) -%}{%- for message in messages -%}"
        "{%- if message['role'] == 'user' -%}"
        f"{{%- set content = {before} + message['content'] + {after} -%}}"
        "{%- set places.turns = places.turns + [dict(message, content=content)] -%}"
        "{%- elif message['role'] == 'assistant' -%}"
        f"{{%- set content = {answer} + (message['content'] or '') -%}}"
        "{%- set places.turns = places.turns + [dict(message, content=content)] -%}"
        "{%- else -%}{%- set places.turns = places.turns + [message] -%}{%- endif -%}"
        "{%- endfor -%}{%- set messages = places.turns -%}"
    )
    # Jinja drops one newline at the end of a template, and this one is no longer there.
    asked = f"{{% if add_generation_prompt %}}{{{{ {answer} }}}}{{% endif %}}"
    return f"{turns}{{{{- {front} }}}}{original.removesuffix(chr(10))}{asked}"


def _texts(numbers: Iterator[int], count: int) -> Iterator[str]:
    return (placeholder(next(numbers)) for _ in range(count))


def _refuse_lost_places(tokenizer: PreTrainedTokenizerBase, positions: Mapping[str, int]) -> None:
    """Raise where what stands before an answer in training is not the prompt, with every placeholder in its order."""
    from peftctl.data.conversations import Message
    from peftctl.data.turns import Chat

    ask = [Message("user", "a"), Message("assistant", "b")]
    chat, names = Chat(tokenizer), [placeholder(i) for i in range(1, sum(positions.values()) + 1)]
    try:
        turn, prompt = chat.turn(ask, 1, None, KEY), chat.render(ask[:1], None, KEY, generation=True)
        kept = turn.text[: turn.start] == prompt and not _WRITTEN.search(turn.text[turn.start :])
    except DataError:  # it can't find the answer
        kept = False
    if not kept or _WRITTEN.findall(prompt) != names:
        raise UsageError(
            f"{KEY}: this model's chat template does not keep {', '.join(positions)} in place before an answer; "
            f"set it to template and write {names[0]} to {names[-1]} into data.template"
        )
