"""Frozen low-rank terms beside the A and B that train, and the stock LoRA adapter that holds both.

    y = W x + s B A x + s F E x,   E: (q, d_in), F: (d_out, q), frozen

PiSSA and OLoRA subtract the factors that they start from, F E = -B_0 A_0, so that W itself need not be changed; restart
methods keep the factors of earlier cycles there. W stays the untouched base: switching the adapter off gives it back, a
quantised or half-type base loses nothing, and the result is exactly one LoRA of rank r + q, [B F] and [A; E].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from peftctl.tuners.lora_linear import LeanTraining


class FixedFactors(nn.Module):
    """E: (q, d_in) and F: (d_out, q) of one layer; not in its state, so a checkpoint must hold them.

    Args:
        e: E.
        f: F.
        undoes_start: E and -F are what A and B started from.
    """

    E: torch.Tensor
    F: torch.Tensor

    def __init__(self, e: torch.Tensor, f: torch.Tensor, undoes_start: bool = False):
        super().__init__()
        self.undoes_start = undoes_start
        self.register_buffer("E", e.detach().clone(), persistent=False)
        self.register_buffer("F", f.detach().clone(), persistent=False)

    def beside(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors (r + q, d_in) and (d_out, r + q) of B A + F E: [A; E] and [B F].

        Where F E takes the start B_0 A_0 away, they are [A - A_0; A_0] and [B, B - B_0], with the same product: the
        differences are small, and to round A and A_0 to a half type one by one would drown what was learned.
        """
        first, second = (a - self.E, b + self.F) if self.undoes_start else (a, self.F)
        return torch.cat([first, self.E]), torch.cat([b, second], dim=1)


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the LoRA layers that can have fixed factors, with their names in the model."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LeanTraining))


def base_matrix(layer: Any) -> torch.Tensor:
    """Return a layer's W: (d_out, d_in) in float32, whatever type and orientation the base keeps it in."""
    weight = layer.get_base_layer().weight.detach().float()
    return weight.T if layer.fan_in_fan_out else weight


def start_from(layer: Any, a: torch.Tensor, b: torch.Tensor) -> None:
    """Let A and B start at given values, and undo them with E = A and F = -B: the layer still computes W x."""
    factor_a, factor_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        factor_a.copy_(a)
        factor_b.copy_(b)
    layer.fixed_factors = FixedFactors(factor_a, -factor_b, undoes_start=True)


def factor_parameters(layer: Any) -> list[nn.Parameter]:
    """Return what A and B are made of."""
    return [*layer.lora_A["default"].parameters(), *layer.lora_B["default"].parameters()]


def restart(layer: Any, generator: torch.Generator) -> list[nn.Parameter]:
    """Append A and B to the fixed factors, draw A anew and set B to zero; return what A and B are made of.

    The layer computes what it did before. A is drawn Kaiming-uniform, as peft draws it, on the CPU on any device.
    """
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    had = layer.fixed_factors
    e, f = a.weight, b.weight
    if had is not None:
        e, f = torch.cat([had.E, e]), torch.cat([had.F, f], dim=1)
    layer.fixed_factors = FixedFactors(e, f)
    with torch.no_grad():
        drawn = torch.empty_like(a.weight, device="cpu")
        a.weight.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator))
        for parameter in b.parameters():
            parameter.zero_()
    return factor_parameters(layer)


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
        had, like = layer.fixed_factors, layer.lora_A["default"].weight
        layer.fixed_factors = None
        if name in state:
            e, f = (factor.to(like) for factor in state[name])
            layer.fixed_factors = FixedFactors(e, f, undoes_start=had is not None and had.undoes_start)


def into_one_adapter(peft_model: Any) -> Any:
    """Turn A, B, E and F of every layer into plain factors of rank r + q, in place; scales stay as they were.

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
        down, up = layer.fixed_factors.beside(layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        layer.lora_A["default"], layer.lora_B["default"] = _linear(down), _linear(up)
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
