"""Padding."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from peftctl.data.collate import Collator
from peftctl.data.encode import EncodedRow
from tests.tiny import tiny_tokenizer

ROWS = [EncodedRow([5, 6, 2], [-100, 6, 2], "x:1"), EncodedRow([7, 2], [7, 2], "x:2")]


def test_pads_on_the_right():
    batch = Collator(tiny_tokenizer())(ROWS)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 2], [7, 2, 3]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[-100, 6, 2], [7, 2, -100]],
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_multiple():
    batch = Collator(tiny_tokenizer(), pad_to_multiple_of=8)(ROWS)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (2, 8)
    assert Collator(tiny_tokenizer(), pad_to_multiple_of=3)(ROWS)["labels"].shape == (2, 3)


def test_eos_as_padding_is_masked_and_the_real_one_is_trained():
    batch = Collator(SimpleNamespace(pad_token_id=None, eos_token_id=2))(ROWS)
    assert batch["input_ids"][1].tolist() == [7, 2, 2]
    assert batch["labels"][1].tolist() == [7, 2, -100]
    assert Collator(SimpleNamespace(pad_token_id=None, eos_token_id=None))(ROWS)["input_ids"][1, 2] == 0


def test_no_rows_give_a_batch_that_trains_nothing():
    batch = Collator(tiny_tokenizer(), pad_to_multiple_of=4)([])
    assert batch["input_ids"].shape == (1, 4)
    assert batch["attention_mask"].sum() == 1
    assert (batch["labels"] == -100).all()
