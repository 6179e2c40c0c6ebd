"""Heads of classification models: new, random, and trained whole beside every method."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CLASSIFICATION = ("seq_cls", "token_cls")
"""Tasks whose head does not come with the base."""


def head_names(model: PreTrainedModel, task: str) -> list[str]:
    """Return the names of the modules outside the backbone, e.g. `classifier`; none for language models.

    peft finds the same ones for its SEQ_CLS and TOKEN_CLS, and saves them with the adapter.
    """
    if task not in CLASSIFICATION:
        return []
    children = model.named_children()
    return [name for name, child in children if name != model.base_model_prefix and list(child.parameters())]


def head_parameters(model: PreTrainedModel, task: str) -> int:
    """Return how many parameters the head has."""
    return sum(p.numel() for name in head_names(model, task) for p in model.get_submodule(name).parameters())
