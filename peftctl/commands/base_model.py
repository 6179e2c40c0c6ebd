"""The base model that a run trains on: loaded, with new tokens' rows, before the method is attached."""

from __future__ import annotations

from typing import Any

import torch

from peftctl.commands.prepare import Prepared
from peftctl.models.load import load_model


def load_base(ready: Prepared, device: torch.device) -> Any:
    """Return the base model of a run on its device, in evaluation mode.

    Args:
        ready: The prepared recipe.
        device: Where to put it.
    """
    options, model = ready.method.load_options(), ready.recipe.model
    return load_model(
        model,
        dtype=options.dtype or model.dtype,
        device=device,
        attn_implementation=options.attn_implementation,
        quantization=ready.recipe.quantization,
    )
