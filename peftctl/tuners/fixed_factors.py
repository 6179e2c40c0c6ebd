"""Frozen low-rank terms beside the A and B that train, and the stock LoRA adapter that holds both.

    y = W x + s B A x + s F E x,   E: (q, d_in), F: (d_out, q), frozen

PiSSA and OLoRA subtract the factors that they start from, F E = -B_0 A_0, so that W itself need not be changed; restart
methods keep the factors of earlier cycles there. W stays the untouched base: switching the adapter off gives it back, a
quantised or half-type base loses nothing, and the result is exactly one LoRA of rank r + q, [B F] and [A; E].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from peftctl.tuners.lora_linear import LeanTraining


class FixedFactors(nn.Module):
    """E: (q, d_in) and F: (d_out, q) of one layer; not in its state, so a checkpoint must hold them."""

    E: torch.Tensor
    F: torch.Tensor

    def __init__(self, e: torch.Tensor, f: torch.Tensor):
        super().__init__()
        self.register_buffer("E", e.detach().clone(), persistent=False)
        self.register_buffer("F", f.detach().clone(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return F E x for x of shape (..., d_in)."""
        return functional.linear(functional.linear(x, self.E.to(x.dtype)), self.F.to(x.dtype))


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the LoRA layers that can have fixed factors, with their names in the model."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LeanTraining))


def add_factors(layer: Any, e: torch.Tensor, f: torch.Tensor) -> None:
    """Append E: (q, d_in) and F: (d_out, q) to what a layer has."""
    had = layer.fixed_factors
    if had is not None:
        e, f = torch.cat([had.E, e.to(had.E)]), torch.cat([had.F, f.to(had.F)], dim=1)
    layer.fixed_factors = FixedFactors(e, f)


def factors_state(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return name -> (E, F) of the layers that have some, for a checkpoint."""
    return {
        name: (layer.fixed_factors.E.cpu(), layer.fixed_factors.F.cpu())
        for name, layer in layers(model)
        if layer.fixed_factors is not None
    }


def load_factors(model: nn.Module, state: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Give every layer the factors of `factors_state`, and none to those that had none."""
    for name, layer in layers(model):
        layer.fixed_factors = None
        if name in state:
            like = layer.lora_A["default"].weight
            layer.fixed_factors = FixedFactors(*(factor.to(like) for factor in state[name]))


def into_one_adapter(peft_model: Any) -> Any:
    """Turn A, B, E and F of every layer into plain factors [A; E] and [B F], in place; scales stay as they were.

    Raises:
        ValueError: r + q is not the same multiple of r in all layers, which one adapter's settings can't say.
    """
    config = peft_model.peft_config["default"]
    times = {
        1 + layer.fixed_factors.E.shape[0] // layer.r["default"] if layer.fixed_factors is not None else 1
        for _, layer in layers(peft_model)
    }
    if times == {1}:
        return peft_model
    if len(times) != 1:
        raise ValueError(f"fixed factors of different sizes: {times} times r")
    (more,) = times
    for _, layer in layers(peft_model):
        a, b, fixed = layer.lora_A["default"], layer.lora_B["default"], layer.fixed_factors
        layer.lora_A["default"] = _linear(torch.cat([a.weight, fixed.E.to(a.weight)]))
        layer.lora_B["default"] = _linear(torch.cat([b.weight, fixed.F.to(b.weight)], dim=1))
        layer.fixed_factors = None
        layer.r["default"] *= more
    # The scale is alpha / r, or alpha / sqrt(r) with rsLoRA, of every layer.
    wider = more**0.5 if config.use_rslora else more
    config.r *= more
    config.lora_alpha *= wider
    config.rank_pattern = {name: r * more for name, r in config.rank_pattern.items()}
    config.alpha_pattern = {name: alpha * wider for name, alpha in config.alpha_pattern.items()}
    for _, layer in layers(peft_model):
        layer.lora_alpha["default"] *= wider
    return peft_model


def _linear(weight: torch.Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight.detach().clone())
    return made
