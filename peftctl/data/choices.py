"""Wrong answers beside the right one: each is encoded as the right one is, behind the same prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from peftctl.data.encode import EncodedRow
from peftctl.data.formats import Example

if TYPE_CHECKING:
    from peftctl.data.pairs import RowEncoder


def encode_with_choices(encoder: RowEncoder, example: Example) -> list[EncodedRow]:
    """Return the rows of an example, its one row with its wrong answers where it has some.

    A wrong answer that `data.max_length` leaves nothing of is left out.
    """
    rows = encoder.encode(example)
    if not example.wrong_answers:
        return rows
    encoded = [row for answer in example.wrong_answers for row in encoder.encode(_answered(example, answer))]
    wrong = tuple(row for row in encoded if row.dropped_reason is None)
    return [replace(row, wrong=wrong) for row in rows]


def _answered(example: Example, answer: str) -> Example:
    """Return the example with another answer."""
    if example.messages is None:
        return replace(example, completion=answer, wrong_answers=())
    *before, last = example.messages
    return replace(example, messages=[*before, replace(last, content=answer)], wrong_answers=())
