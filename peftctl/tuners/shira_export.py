"""A sparse update as peft's own SHIRA, which plain peft loads.

SHIRA holds the same number of entries per input and output, r, in every layer: r (d_in + d_out). Layers with fewer are
padded with zeros at their first entry, which change nothing; the file grows to what the fullest layer asks for.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import ShiraConfig, get_peft_model
from torch import nn

from peftctl.tuners.sparse_delta import SparseDeltaLayer, layers


def shira_rank(peft_model: Any) -> int:
    """Return the least r that holds the entries of every layer.

    Raises:
        ValueError: Some layer is no Linear, or has fewer weights than SHIRA would give it.
    """
    sizes: dict[str, tuple[int, int]] = {}
    r = 1
    for name, layer in layers(peft_model):
        base = layer.get_base_layer()
        if not isinstance(base, nn.Linear):
            raise ValueError(f"{name} is a {type(base).__name__}, and SHIRA takes Linear layers only")
        sizes[name] = (base.in_features, base.out_features)
        r = max(r, -(-layer.delta_values["default"].numel() // sum(sizes[name])))
    for name, (d_in, d_out) in sizes.items():
        if r * (d_in + d_out) > d_in * d_out:
            raise ValueError(f"the fullest layer asks for r = {r}, and {name} has only {d_in * d_out} weights")
    return r


def into_shira(peft_model: Any) -> Any:
    """Return a PeftModel of type SHIRA with the same entries on the same base; the given one is consumed."""
    r, ours = shira_rank(peft_model), dict(layers(peft_model))
    old = peft_model.peft_config["default"]
    config = ShiraConfig(r=r, target_modules=list(ours), task_type=old.task_type, modules_to_save=old.modules_to_save)
    config.mask_fn = None  # type: ignore[assignment]  # the entries are known
    model = get_peft_model(peft_model.unload(), config)
    for name, layer in ours.items():
        target: Any = model.get_base_model().get_submodule(name)
        target.shira_indices["default"], values = _padded(layer, target.shira_weight["default"].numel())
        target.shira_weight["default"].data = values
    return model.train(peft_model.training)


def _padded(layer: SparseDeltaLayer, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (2, size) rows and columns, and (size,) values."""
    flat, values = layer.delta_indices["default"], layer.delta_values["default"].detach()
    padding = size - len(values)
    flat = torch.cat([flat, flat.new_zeros(padding)])
    width = layer.weight.shape[1]
    places = torch.stack([flat // width, flat % width])
    return places.to(torch.int32), torch.cat([values, values.new_zeros(padding)])
