"""A row as its reader sees it: text, and what of it is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from peftctl.data.encode import IGNORED, EncodedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def preview(
    row: EncodedRow, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str | int] = ()
) -> list[tuple[str, bool]]:
    """Return (text, trained on?) pieces; put together they are the decoded row, special tokens included.

    Of a pair the two sequences, each on a line of its own; of a text with a class the text, and the class's name.
    """

    def decoded(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def text(tokens: int) -> str:
        return decoded(row.input_ids[:tokens])

    if row.paired:
        return [(decoded(row.input_ids) + "\n", False), (decoded(row.labels), True)] if row.labels else []
    if row.classes and len(row.labels) < len(row.input_ids):
        return [(decoded(row.input_ids) + "\n", False), (str(labels[row.labels[0]]), True)]
    whole = text(len(row.input_ids))
    pieces = []
    tokens = shown = 0
    for supervised, run in groupby(row.labels, key=lambda label: label != IGNORED):
        tokens += len(list(run))
        # Decoded from the beginning each time: a token alone may be half a character, or lose its space.
        end = len(text(tokens))
        pieces.append((whole[shown:end], supervised))
        shown = end
    return pieces
