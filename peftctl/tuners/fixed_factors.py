"""Frozen low-rank terms beside the A and B that train, and the stock LoRA adapter that holds both.

    y = W x + s B A x + s F E x,   E: (q, d_in), F: (d_out, q), frozen

PiSSA and OLoRA subtract the factors that they start from, F E = -B_0 A_0, so that W itself need not be changed; restart
methods keep the factors of earlier cycles there, and Delta-LoRA those that W follows from. W stays the untouched base:
switching the adapter off gives it back, a quantised or half-type base loses nothing, and the result is exactly one LoRA
of rank r + q, [B F] and [A; E].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
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


class FollowedProduct(FixedFactors):
    """The B_K A_K that W follows from, to W + weight (s B A - s B_K A_K): see `methods/delta_lora.py`.

    Args:
        e: A_K: (r, d_in).
        f: B_K: (d_out, r).
        weight: lambda.
    """

    def __init__(self, e: torch.Tensor, f: torch.Tensor, weight: float):
        super().__init__(e, f)
        self.weight = weight

    def beside(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors (2 r, d_in) and (d_out, 2 r) of (1 + weight) B A - weight B_K A_K.

        They are [A - A_K; A_K] and [(1 + weight) B, (1 + weight) B - weight B_K]: differences before rounding to a half
        type, as for a start that is undone. A and B get the gradients of B A alone.
        """
        still = a.detach()
        slowed = still + (a - still) / (1 + self.weight)  # of the value of A, with a share of its gradient
        scaled = b + self.weight * b.detach()
        return torch.cat([slowed - self.E, self.E]), torch.cat([scaled, scaled - self.weight * self.F], dim=1)


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


def follow(layer: Any, weight: float) -> None:
    """Let W follow s B A from its present value on, without a gradient: the layer computes what it did before.

    Args:
        layer: A LoRA layer.
        weight: lambda, how far it follows.
    """
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    layer.fixed_factors = FollowedProduct(a, b, weight)


def factor_parameters(layer: Any) -> list[nn.Parameter]:
    """Return what A and B are made of."""
    return [*layer.lora_A["default"].parameters(), *layer.lora_B["default"].parameters()]


def restart(
    layer: Any,
    generator: torch.Generator,
    keep: float = 0.0,
    rank: int | None = None,
    next_rank: int | None = None,
) -> list[nn.Parameter]:
    """Move B A to the fixed factors and begin anew; return what A and B are made of.

    The layer computes what it did before: 1 - keep of B A joins the fixed factors, and keep of it stays. With keep 0, A
    is drawn Kaiming-uniform, as peft draws it, on the CPU on any device, and B is zero.

    Args:
        layer: A LoRA layer.
        generator: Draws A.
        keep: Share of B A that A and B keep, sqrt(keep) each.
        rank: Rows of A, and columns of B, that were trained; None is all.
        next_rank: Those that will be; the others are zero, and so are their gradients: they stay so.
    """
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    had, moved = layer.fixed_factors, math.sqrt(1 - keep)
    e, f = a.weight[:rank] * moved, b.weight[:, :rank] * moved
    if had is not None:
        e, f = torch.cat([had.E, e]), torch.cat([had.F, f], dim=1)
    layer.fixed_factors = FixedFactors(e, f)
    with torch.no_grad():
        if keep:
            for parameter in factor_parameters(layer):
                parameter.mul_(math.sqrt(keep))
            return factor_parameters(layer)
        drawn = torch.empty_like(a.weight, device="cpu")
        a.weight.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator))
        if next_rank is not None:
            a.weight[next_rank:] = 0
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


def load_factors(
    model: nn.Module,
    state: dict[str, tuple[torch.Tensor, torch.Tensor]],
    make: Callable[[torch.Tensor, torch.Tensor], FixedFactors] | None = None,
) -> None:
    """Give every layer the factors of `factors_state`, and none to those that had none.

    Args:
        model: With one adapter.
        state: Name -> (E, F).
        make: Makes a layer's factors; None makes FixedFactors that undo a start where those that a layer has do.
    """
    for name, layer in layers(model):
        had, like = layer.fixed_factors, layer.lora_A["default"].weight
        layer.fixed_factors = None
        if name in state:
            e, f = (factor.to(like) for factor in state[name])
            undoes_start = had is not None and had.undoes_start
            layer.fixed_factors = make(e, f) if make else FixedFactors(e, f, undoes_start)


def into_one_adapter(peft_model: Any, rank: int | None = None) -> Any:
    """Turn A, B, E and F of every layer into plain factors of rank r + q, in place; scales stay as they were.

    Args:
        peft_model: With one adapter.
        rank: Rows of A, and columns of B, that count; None is all r.

    Raises:
        ValueError: The rank does not grow alike in all layers, which one adapter's settings can't say.
    """
    config = peft_model.peft_config["default"]
    pairs = {name: _all_factors(layer, rank) for name, layer in layers(peft_model)}
    growth = {Fraction(len(pairs[name][0]), layer.r["default"]) for name, layer in layers(peft_model)}
    if growth == {Fraction(1)}:
        return peft_model
    if len(growth) != 1:
        raise ValueError(f"the ranks of the layers grow by different factors: {', '.join(map(str, growth))}")
    (times,) = growth
    for name, layer in layers(peft_model):
        layer.lora_A["default"], layer.lora_B["default"] = map(_linear, pairs[name])
        layer.fixed_factors = None
        layer.r["default"] = len(pairs[name][0])
    # The scale is alpha / r, or alpha / sqrt(r) with rsLoRA, of every layer.
    wider = float(times) ** 0.5 if config.use_rslora else float(times)
    config.r = int(config.r * times)
    config.lora_alpha *= wider
    config.rank_pattern = {name: int(r * times) for name, r in config.rank_pattern.items()}
    config.alpha_pattern = {name: alpha * wider for name, alpha in config.alpha_pattern.items()}
    for _, layer in layers(peft_model):
        layer.lora_alpha["default"] *= wider
    return peft_model


def _all_factors(layer: Any, rank: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (r + q, d_in) and (d_out, r + q), with only `rank` of r."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    down, up = (a, b) if layer.fixed_factors is None else layer.fixed_factors.beside(a, b)
    kept = [*range(len(a))[:rank], *range(len(a), len(down))]
    return down[kept], up[:, kept]


def _linear(weight: torch.Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight.detach().clone())
    return made
