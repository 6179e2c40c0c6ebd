"""The tiny models of the conformance suite, their rows, and which method meets which model."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peftctl.data.encode import EncodedRow
from peftctl.methods import registry
from peftctl.models.classifier import Head
from peftctl.recipe.schema import CLASSIFICATION
from tests import tiny


@dataclass(frozen=True)
class Tiny:
    """A tiny model and the rows that it trains on."""

    task: str
    make: Callable[[], Any]
    rows: Callable[[], list[EncodedRow]]


def _ids(draw: random.Random) -> list[int]:
    return [draw.randrange(4, 390) for _ in range(draw.randrange(6, 21))]


def sequences() -> list[EncodedRow]:
    """Return four rows of 6 to 20 tokens, the second half of each supervised."""
    draw = random.Random(0)
    rows = [_ids(draw) for _ in range(4)]
    return [EncodedRow(ids, [-100] * (len(ids) // 2) + ids[len(ids) // 2 :], f"rows:{i}") for i, ids in enumerate(rows)]


def pairs() -> list[EncodedRow]:
    """Return four pairs of 6 to 20 tokens and their second half."""
    draw = random.Random(0)
    rows = [_ids(draw) for _ in range(4)]
    return [EncodedRow(ids, ids[len(ids) // 2 :], f"rows:{i}", paired=True) for i, ids in enumerate(rows)]


def classified() -> list[EncodedRow]:
    """Return four rows of 6 to 20 tokens, each of one of three classes."""
    return [EncodedRow(row.input_ids, [i % 3], row.where, classes=True) for i, row in enumerate(sequences())]


def tagged() -> list[EncodedRow]:
    """Return four rows of 6 to 20 tokens, every second one with one of three classes."""
    return [
        EncodedRow(row.input_ids, [i % 3 if i % 2 else -100 for i in row.input_ids], row.where, classes=True)
        for row in sequences()
    ]


def short_llama() -> Any:
    """Return the tiny Llama without its upper half: two layers show what four do."""
    model = tiny.tiny_llama()
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    return model


MODELS = {
    "llama": Tiny("causal_lm", short_llama, sequences),
    "opt": Tiny("causal_lm", tiny.tiny_opt, sequences),
    "t5": Tiny("seq2seq_lm", tiny.tiny_t5, pairs),
    "bert": Tiny("seq_cls", tiny.tiny_bert, classified),
    "tagger": Tiny("token_cls", tiny.tiny_bert, tagged),
}
LABELS = ["negative", "neutral", "positive"]

RENAMED: dict[str, dict[str, str]] = {
    "opt": {"o_proj": "out_proj"},
    "t5": {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"},
    "bert": {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "attention.output.dense"},
}
"""What other architectures call the projections that recipes, which are for Llama-like models, name."""
RENAMED["tagger"] = RENAMED["bert"]

OVERRIDES: dict[str, dict[str, Any]] = {
    # Experts of a micro-batch are balanced against each other, so that two batches of two don't add up to one of four.
    "loramoe": {"balance": 0.0},
    # An expert that no token chose stands still, and four short rows have few tokens for the eight of the recipe.
    "mola": {"allocation": [3, 2]},
    # A square A: (r, d_in) is nearly singular, and the inverse of A A^T would make differences of rounding large.
    "lora_fa": {"r": 8, "alpha": 8},
    # A dropout by another name: accumulated and recomputed runs would draw other masks than the straight one.
    "lora_dropout": {"p": 0.0},
    # Layers that share a pair have one name for it, and the suite wants all names of the start at the end. The step
    # after the checkpoint must be in the checkpoint's stage.
    "lora_drop": {"threshold": 1.0, "sample_steps": 0.6},
    # The suite wants all names of the start at the end, and what is frozen as it was: here which rows or entries train.
    "far": {"retention": 1.0, "priming": 0.6},
    "neft": {"ratio": 1.0, "sft": 0.6},
    # An adapter that rests in a step has no gradient in it, and three steps may be too few for the lowest one.
    "adapter_drop": {"max_drop": 0},
    # Half a percent of a model of width 32 gives every part a rank of one, which moves the loss little in three steps.
    "s4": {"budget": 0.2},
}
"""Method -> keys of its section that a model of width 32 can't have as the recipe sets them, each with its reason."""

REFUSED: dict[tuple[str, str], str] = {
    ("bitfit", "llama"): "llama architecture has none",  # no bias in any layer
    ("bitfit", "t5"): "t5 architecture has none",  # likewise
}
"""(method, model) -> what the refusal says, with what the model lacks."""

CARDS = {name: registry.get(name).card for name in registry.names()}
CLAIMED = [(name, key) for name, card in CARDS.items() for key, model in MODELS.items() if model.task in card.tasks]
CASES = [pair for pair in CLAIMED if pair not in REFUSED]
TRAINING = [(name, key) for name, key in CASES if "trains" not in CARDS[name].gates_off]


def _kind(case: tuple[str, str]) -> tuple[str, str]:
    task = MODELS[case[1]].task
    return case[0], "classifier" if task in CLASSIFICATION else task


AGAIN = list({_kind(case): case for case in reversed(TRAINING)}.values())[::-1]
"""Of each method one decoder, one encoder-decoder and one classifier: for checks that train a case once more."""


def head_of(model: str) -> Head | None:
    """Return what the head of a tiny model is made for; None for a language model."""
    return Head(LABELS, tiny.tiny_tokenizer().pad_token_id) if MODELS[model].task in CLASSIFICATION else None
