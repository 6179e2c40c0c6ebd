"""Plain templates: a row's fields -> the text before its answer."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from typing import Any

from peftctl.data.problems import kind, wrong
from peftctl.errors import UsageError, did_you_mean

CHAT = "chat"
ALPACA = "alpaca"

_ESCAPE_HINT = "write {{ and }} for braces in the text"

# The wording of the Stanford Alpaca project, to which models are tuned; a format, hence not ours to improve.
_ALPACA_INTRO = "Below is an instruction that describes a task"
_ALPACA_WITH_INPUT = (
    _ALPACA_INTRO + ", paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA_WITHOUT_INPUT = (
    _ALPACA_INTRO + ". Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def is_plain(template: str) -> bool:
    """Whether the template is a "{...}" string."""
    return template not in (CHAT, ALPACA)


def check(template: str, answer: str) -> None:
    """Refuse a "{...}" string that can't be filled in, or that names the answer.

    Raises:
        DataError: Braces that don't match, a format specification, no field at all, or the answer among them.
    """
    names = [name for _, name in _pieces(template) if name is not None]
    if not names:
        hint = did_you_mean(template, (CHAT, ALPACA))
        raise wrong("data.template", f"expected chat, alpaca or text with a {{field}}, got {template!r}", hint)
    if answer in names:
        raise wrong("data.template", f"names {{{answer}}}, the answer", "leave it out: it follows the template")


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """Return the Alpaca prompt up to the answer."""
    if context:
        return _ALPACA_WITH_INPUT.format(instruction=instruction, input=context)
    return _ALPACA_WITHOUT_INPUT.format(instruction=instruction)


def frame(template: str) -> Callable[[str], str]:
    """Return what puts a single request into a plain template.

    Raises:
        UsageError: It takes several fields.
    """
    if template == ALPACA:
        return alpaca_prompt
    fields = {name for _, name in _pieces(template) if name is not None}
    if len(fields) != 1:
        raise UsageError(f"data.template takes {', '.join(sorted(fields))}; expected one field for a single request")
    (field,) = fields
    return lambda text: fill(template, {field: text}, "this message")


def fill(template: str, fields: Mapping[str, Any], where: str) -> str:
    """Return the template with `{name}` replaced by the field; `{{` and `}}` stand for braces.

    Args:
        template: Text with {field} names.
        fields: Field -> text or number.
        where: Place of the row.

    Raises:
        DataError: The template names a field that the row lacks, or one that is not text or a number.
    """
    text = ""
    for literal, name in _pieces(template):
        text += literal
        if name is None:
            continue
        if name not in fields:
            raise wrong(where, f"data.template names {{{name}}}; the row has: {', '.join(fields)}")
        value = fields[name]
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise wrong(where, f"data.template names {{{name}}}: expected text or a number, got {kind(value)}")
        text += str(value)
    return text


def _pieces(template: str) -> list[tuple[str, str | None]]:
    """Return (text, name of the field after it) of every piece."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise wrong(
            "data.template", f"braces don't match: {error}", "write {{ and }} for braces in the text"
        ) from error
    for _, name, specification, conversion in parsed:
        if name is not None and (not name or specification or conversion):
            raise wrong("data.template", "expected a plain {field}", _ESCAPE_HINT)
    return [(literal, name) for literal, name, _, _ in parsed]
