"""A dense change of a weight behind hard-concrete gates: what DiffPruning trains before it knows which entries to keep.

    y = (W + z ⊙ w) x + b
    s = σ(log u - log(1 - u) + α),   z = min(1, max(0, s (R - L) + L)),   L = -1.5, R = 1.5,   u ~ U(0, 1)
    structured: z = z_i z_g, with one α_g and one u_g for the whole weight

In eval mode s = σ(α). In training u is drawn once for an optimizer step, from the seed, the layer's name and the step:
every micro-batch, every process and every recomputed forward pass of a step sees the same gates. z is made anew in the
backward pass, so nothing of the weight's size is kept for it. W + z ⊙ w is rounded to the type of W.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from peftctl.tuners.sparse_delta import SparseDeltaLayer, place
from peftctl.tuners.sparse_delta import layers as sparse_layers

LOW, HIGH = -1.5, 1.5
OPEN = 5.0
"""α at first: a gate is open, z > 0, with a probability of 0.993."""


class GatedDelta(nn.Module):
    """A Linear or a Conv1D with a gated change of all its weights.

    Args:
        base_layer: The layer.
        structured: Whether one more gate opens and closes the whole change.
        seed: Of the run and of this layer.
    """

    def __init__(self, base_layer: nn.Module, structured: bool, seed: str):
        super().__init__()
        self.base_layer = base_layer
        self.seed, self.step = seed, 0
        weight = base_layer.get_parameter("weight")
        self.change = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))
        self.alpha = nn.Parameter(torch.full_like(weight, OPEN, dtype=torch.float32))
        self.alpha_group = nn.Parameter(weight.new_full((1,), OPEN, dtype=torch.float32)) if structured else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (W + z ⊙ w) x + b for x of shape (..., d_in)."""
        base: Any = self.base_layer
        draw = self._draw() if self.training else None
        product = _Product.apply(
            x, self.change, self.alpha, self.alpha_group, base.weight, draw, isinstance(base, Conv1D)
        )
        return product if base.bias is None else product + base.bias

    def kept(self) -> torch.Tensor:
        """Return z ⊙ w with the gates of eval mode."""
        with torch.no_grad():
            return self.change * _gates(self.alpha, self.alpha_group, None).value

    def expected_open(self) -> torch.Tensor:
        """Return the expected number of open gates, E|z|_0 = Σ σ(α - log(-L/R)), times σ of the group's."""
        shift = math.log(-LOW / HIGH)
        total = torch.sigmoid(self.alpha - shift).sum()
        return total if self.alpha_group is None else total * torch.sigmoid(self.alpha_group - shift).sum()

    def _draw(self) -> int:
        digest = hashlib.sha256(f"{self.seed} {self.step}".encode()).digest()
        return int.from_bytes(digest[:7], "big")


def layers(peft_model: Any) -> Iterator[tuple[str, GatedDelta]]:
    """Yield the layers with their names in the base model."""
    for name, module in peft_model.get_base_model().named_modules():
        if isinstance(module, GatedDelta):
            yield name, module


def into_gated(peft_model: Any, names: Sequence[str], structured: bool, seed: int) -> None:
    """Give layers gated changes in place of the sparse ones that some of them have, in place."""
    base = peft_model.get_base_model()
    for name in names:
        parent, _, leaf = name.rpartition(".")
        layer = base.get_submodule(name)
        if isinstance(layer, GatedDelta):
            continue
        target = layer.get_base_layer() if isinstance(layer, SparseDeltaLayer) else layer
        setattr(base.get_submodule(parent), leaf, GatedDelta(target, structured, f"{seed} {name}"))


def into_sparse(peft_model: Any, indices: Mapping[str, torch.Tensor]) -> None:
    """Keep some entries of the gated changes as sparse ones, and drop the others, in place.

    Args:
        peft_model: With gated layers.
        indices: Name of a layer in the base model -> its entries, (k,), ascending.
    """
    kept = {name: gated.kept().flatten() for name, gated in layers(peft_model)}
    place_anywhere(peft_model, indices)
    for name, layer in sparse_layers(peft_model):
        layer.delta_values["default"].data.copy_(kept[name][layer.delta_indices["default"].long()])


def place_anywhere(peft_model: Any, indices: Mapping[str, torch.Tensor]) -> None:
    """Choose the entries that train, in place, also in layers that have none yet or gated changes; all else is dropped.

    Args:
        peft_model: With one sparse adapter.
        indices: Name of a layer in the base model -> its entries, (k,), ascending.
    """
    base, config = peft_model.get_base_model(), peft_model.peft_config["default"]
    for name, gated in list(layers(peft_model)):
        parent, _, leaf = name.rpartition(".")
        setattr(base.get_submodule(parent), leaf, gated.base_layer)
    config.counts = {name: len(chosen) for name, chosen in indices.items()}
    present = {name for name, _ in sparse_layers(peft_model)}
    for name in indices.keys() - present:
        parent, _, leaf = name.rpartition(".")
        around = base.get_submodule(parent)
        peft_model.base_model._create_and_replace(config, "default", getattr(around, leaf), leaf, around, name)
    place(peft_model, {name: indices[name] for name, _ in sparse_layers(peft_model) if name in indices})


class _Gates:
    """Gates and their derivatives.

    Args:
        own: z_i.
        own_slope: dz_i / dα_i.
        group: z_g; 1 where there is none.
        group_slope: dz_g / dα_g.
    """

    def __init__(self, own: torch.Tensor, own_slope: torch.Tensor, group: Any, group_slope: Any):
        self.own, self.own_slope, self.group, self.group_slope = own, own_slope, group, group_slope

    @property
    def value(self) -> torch.Tensor:
        """Return z = z_i z_g."""
        return self.own * self.group


def _gates(alpha: torch.Tensor, group: torch.Tensor | None, draw: int | None) -> _Gates:
    source = None if draw is None else torch.Generator(alpha.device).manual_seed(draw)
    own, slope = _hard_concrete(alpha, source)
    whole: tuple[Any, Any] = (1.0, 0.0) if group is None else _hard_concrete(group, source)
    return _Gates(own, slope, *whole)


def _hard_concrete(alpha: torch.Tensor, source: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return z and dz/dα, of α's shape."""
    logits = alpha
    if source is not None:
        u = torch.rand(alpha.shape, generator=source, device=alpha.device)
        logits = alpha + torch.logit(u)
    s = torch.sigmoid(logits)
    stretched = s * (HIGH - LOW) + LOW
    inside = (stretched > 0) & (stretched < 1)
    return stretched.clamp(0, 1), (HIGH - LOW) * s * (1 - s) * inside


class _Product(torch.autograd.Function):
    """x (W + z ⊙ w)^T, with gradients for x, w and both kinds of α."""

    @staticmethod
    def forward(
        ctx: Any, x: Any, change: Any, alpha: Any, group: Any, weight: Any, draw: int | None, turned: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(x, change, alpha, group, weight)
        ctx.draw, ctx.turned = draw, turned  # a Conv1D stores (d_in, d_out)
        changed = _changed(weight, change, _gates(alpha, group, draw))
        return functional.linear(x, changed.T if turned else changed)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, change, alpha, group, weight = ctx.saved_tensors
        gates = _gates(alpha, group, ctx.draw)
        for_x = for_group = None
        if ctx.needs_input_grad[0]:
            changed = _changed(weight, change, gates)
            for_x = upstream @ (changed.T if ctx.turned else changed)
        flat_x, flat_up = x.flatten(0, -2), upstream.flatten(0, -2)
        for_weight = (flat_x.T @ flat_up if ctx.turned else flat_up.T @ flat_x).to(change.dtype)
        through = for_weight * change
        if group is not None:
            for_group = (through * gates.own).sum() * gates.group_slope
        for_alpha = through * gates.own_slope * gates.group
        return for_x, for_weight * gates.value, for_alpha, for_group, None, None, None


def _changed(weight: torch.Tensor, change: torch.Tensor, gates: _Gates) -> torch.Tensor:
    """Return W + z ⊙ w, rounded once."""
    wide = torch.promote_types(weight.dtype, change.dtype)
    return (weight.to(wide) + gates.value * change).to(weight.dtype)
