"""Heads of classification models: new, random, and trained whole beside every method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftctl.models import classifier

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PEFT_HEADS = ("classifier", "score")
"""Modules that peft trains and saves with an adapter whose task type is SEQ_CLS or TOKEN_CLS, without being asked."""


def head_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the modules outside the backbone, e.g. `classifier`; none for language models."""
    return classifier.head_names(model)


def unknown_to_peft(model: PreTrainedModel) -> list[str]:
    """Return the modules of the head that peft must be told of by `modules_to_save`, e.g. `pre_classifier`."""
    return [name for name in classifier.head_names(model) if name not in PEFT_HEADS]


def head_parameters(model: PreTrainedModel) -> int:
    """Return how many parameters the head has."""
    return sum(p.numel() for name in head_names(model) for p in model.get_submodule(name).parameters())
