"""Masks of finished runs: which entries of which layers a sparse adapter changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from peftctl.errors import UsageError
from peftctl.methods._earlier import adapter_folder

if TYPE_CHECKING:
    import torch

_INDICES = ".delta_indices"
"""What the names of masks in an adapter file end with."""
_MASK = "give a finished run of diff_pruning or fishmask"


def read_counts(run: str, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return how many entries of each layer a finished run's mask has.

    Args:
        run: Run or adapter directory.
        sizes: Name of a chosen layer -> its number of weights.

    Raises:
        UsageError: It has no mask, or one over other layers.
    """
    from peftctl.tuners.sparse_delta import TYPE

    try:
        config = json.loads((adapter_folder(run) / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"method.mask_from: {run} holds no adapter ({error}); {_MASK}") from error
    if config.get("peft_type") != TYPE:
        raise UsageError(f"method.mask_from: {run} holds no mask, but an adapter of {config.get('peft_type')}; {_MASK}")
    for name, k in config["counts"].items():
        if k > sizes.get(name, 0):
            raise UsageError(f"method.mask_from: the mask of {run} is over {name} too; give the same target_modules")
    return config["counts"]


def read_mask(run: str) -> dict[str, torch.Tensor]:
    """Return name of a layer in the base model -> the entries of a finished run's mask, (k,), ascending.

    Raises:
        UsageError: It can't be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(adapter_folder(run) / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UsageError(f"method.mask_from: {run} can't be read ({error}); {_MASK}") from error
    return {
        name.removeprefix("base_model.model.").removesuffix(_INDICES): tensor
        for name, tensor in tensors.items()
        if name.endswith(_INDICES)
    }
