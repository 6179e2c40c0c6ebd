"""Rows -> one padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from peftctl.data.encode import IGNORED, EncodedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Collator:
    """Pads rows on the right. Labels follow from rows alone, so that EOS as padding token does no harm.

    Tokens and labels are padded apart: a text has one class, and those of an encoder-decoder differ in length. Its
    decoder needs no mask, as no position looks at the padding behind it.

    Args:
        tokenizer: Gives the padding token: its own, else EOS, else 0; padding is masked in any case.
        pad_to_multiple_of: Round the length of a batch up to a multiple of this many tokens.
        fields: Fields that a method asks for besides (`Method.fields`): `task_ids`, or `choices` for wrong answers.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pad_to_multiple_of: int | None = None,
        fields: Sequence[str] = (),
    ):
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id = next(int(token) for token in candidates if token is not None)
        self.multiple = pad_to_multiple_of or 1
        self.fields = fields

    def __call__(self, rows: Sequence[EncodedRow]) -> dict[str, torch.Tensor]:
        """Return input_ids and attention_mask, (batch, seq), and labels, (batch, seq of the labels), int64.

        seq is the longest row, rounded up to the multiple. No rows (a process without a share of the last step) give
        a batch of one padding token without a label, so that every process still takes part in the step. Where they
        are asked for, task_ids, (batch,), say which of `data.sources` a row came from, or -1; and choice_input_ids,
        choice_attention_mask and choice_labels have the wrong answers of all rows, (answers, seq), as wide as the
        batch, and choice_rows, (answers,), whose they are.
        """
        wrong = [(other, i) for i, row in enumerate(rows) for other in row.wrong] if "choices" in self.fields else []
        batch = self._batch([*rows, *(row for row, _ in wrong)])
        if "choices" in self.fields:
            count = max(len(rows), 1)
            choices = {f"choice_{name}": tensor[count:] for name, tensor in batch.items()}
            batch = {name: tensor[:count] for name, tensor in batch.items()} | choices
            batch["choice_rows"] = torch.tensor([i for _, i in wrong], dtype=torch.int64)
        if "task_ids" in self.fields:
            sources = [-1 if row.source is None else row.source for row in rows]
            batch["task_ids"] = torch.tensor(sources or [-1])
        return batch

    def _batch(self, rows: Sequence[EncodedRow]) -> dict[str, torch.Tensor]:
        input_ids = self._padded([row.input_ids for row in rows], self.pad_id)
        labels = self._padded([row.labels for row in rows], IGNORED)
        attention_mask = torch.zeros_like(input_ids)
        for i, row in enumerate(rows):
            attention_mask[i, : len(row.input_ids)] = 1
        if not rows:
            attention_mask[0, 0] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def _padded(self, sequences: Sequence[list[int]], filler: int) -> torch.Tensor:
        longest = max(map(len, sequences), default=1)
        padded = torch.full((max(len(sequences), 1), -(-longest // self.multiple) * self.multiple), filler)
        for i, sequence in enumerate(sequences):
            padded[i, : len(sequence)] = torch.tensor(sequence)
        return padded
