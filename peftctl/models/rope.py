"""Rotary positions (RoPE) of a model: how far they reach, and linear interpolation, which stretches them.

Chen et al. 2023 (arXiv 2306.15595): position m is rotated as m / f, so that f times as many tokens have the angles that
the model knows. `max_position_embeddings` stays what it was, as the library and other tools expect it of this type.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

LINEAR = "linear"


def reach(config: Any) -> int | None:
    """Return how many positions a model knows, stretched ones included; None for no limit."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if positions is None else int(positions * linear_factor(config))


def linear_factor(config: Any) -> float:
    """Return by what a model's positions are divided."""
    rope = _parameters(config)
    return float(rope["factor"]) if rope.get("rope_type") == LINEAR else 1.0


def stretched(config: Any, factor: float) -> dict[str, Any] | None:
    """Return a configuration's RoPE parameters, stretched by a further factor; None where that can't be done."""
    rope = _parameters(config)
    if rope.get("rope_type") not in ("default", LINEAR):  # also one for each type of layer
        return None
    trial = copy.deepcopy(config.get_text_config())
    trial.rope_parameters = {**rope, "rope_type": LINEAR, "factor": linear_factor(config) * factor}
    try:
        trial.validate_rope()
    except ValueError:  # an architecture that reads other types only, as Phi-3
        return None
    return dict(trial.rope_parameters)


def set_rope(model: Any, parameters: Mapping[str, Any]) -> bool:
    """Give a model other RoPE parameters, in its configuration and in its tables; tell whether it has such tables."""
    config = model.config.get_text_config()
    config.rope_parameters = dict(parameters)
    tables = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if _is_made_of(m, config)]
    for name, table in tables:
        with table.inv_freq.device:
            model.set_submodule(name, type(table)(config).train(table.training))
    return bool(tables)


def _parameters(config: Any) -> Mapping[str, Any]:
    return getattr(config.get_text_config(), "rope_parameters", None) or {}


def _is_made_of(module: torch.nn.Module, config: Any) -> bool:
    """Tell whether a module is a table of angles by this configuration; a vision tower has tables of its own."""
    angles = "inv_freq" in dict(module.named_buffers(recurse=False)) and hasattr(module, "rope_type")
    return angles and getattr(module, "config", None) is config
