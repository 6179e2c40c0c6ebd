"""Optimizer groups: what trains, split by who owns it, and matrices, which decay, apart from vectors, which do not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peftctl.recipe.schema import TrainSection


def apart(model: Any, chosen: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """Return the tensors of a model that train: those among the chosen ones, and the others."""
    ids = {id(p) for p in chosen}
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [p for p in trainable if id(p) in ids], [p for p in trainable if id(p) not in ids]


def by_decay(parameters: Iterable[Any], train: TrainSection, **settings: Any) -> list[dict[str, Any]]:
    """Return at most two groups: matrices with the recipe's weight decay, and vectors (biases, norms) without any.

    Args:
        parameters: All of them.
        train: Of the recipe.
        settings: Of both groups, e.g. `lr`.
    """
    everything = list(parameters)
    groups = [
        {"params": [p for p in everything if p.ndim > 1], "weight_decay": train.weight_decay, **settings},
        {"params": [p for p in everything if p.ndim <= 1], "weight_decay": 0.0, **settings},
    ]
    return [group for group in groups if group["params"]]
