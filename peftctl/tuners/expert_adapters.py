"""A bottleneck adapter with several down- and up-projections, of which one of each is used at a time (AdaMix).

    in training   U_j φ(D_i h + b_i) + c_j,    route (i, j) the same for all tokens
    otherwise     Ū φ(D̄ h + b̄) + c̄,           the means over i and over j: one plain adapter

D: (M, m, d), b: (M, m), U: (M', d, m), c: (M', d): all experts lie in one tensor each, so that every tensor has a
gradient in every step, which is 0 where no route led. Routes are set from outside (`set_routes`) and stay until they
are set again: recomputed activations see those of their forward pass.

Two passes over the same rows are one over the rows twice (`two_passes`): the first half takes the first route, the
second half the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

from peftctl.tuners.perceptrons import draw

Route = tuple[int, int]
"""(i, j): which down-projection and which up-projection."""


class ExpertPerceptron(nn.Module):
    """Experts of one adapter. Each D_i and U_j starts as those of a plain one, drawn for itself.

    Args:
        width: d.
        config: Of `bottleneck.py`; its options say how many `downs` and `ups` there are.
    """

    def __init__(self, width: int, config: Any) -> None:
        super().__init__()
        downs, ups, m = config.options["downs"], config.options["ups"], config.bottleneck
        self.down = nn.Parameter(torch.empty(downs, m, width))
        self.down_bias = nn.Parameter(torch.zeros(downs, m))
        self.up = nn.Parameter(torch.empty(ups, width, m))
        self.up_bias = nn.Parameter(torch.zeros(ups, width))
        self.activation = ACT2FN[config.activation]
        self.routes: Sequence[Route] = [(0, 0), (0, 0)]
        self.passes = 1
        for tensor, std in ((self.down, config.init_std), (self.up, config.up_std)):
            for expert in tensor.unbind():
                draw(expert.data, std)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Return the change for h of shape (..., d), in its type."""
        if not self.training:
            plain = self.plain_tensors()
            low = self.activation(_affine(h, plain["down.weight"], plain["down.bias"]))
            return _affine(low, plain["up.weight"], plain["up.bias"])
        downs, ups = zip(*self.routes[: self.passes], strict=True)
        low = self.activation(_routed(h, self.down, self.down_bias, downs))
        return _routed(low, self.up, self.up_bias, ups)

    def plain_tensors(self) -> dict[str, torch.Tensor]:
        """Return the plain adapter that the mean of the experts is, by the names of `Perceptron`'s tensors."""
        return {
            "down.weight": self.down.mean(0),
            "down.bias": self.down_bias.mean(0),
            "up.weight": self.up.mean(0),
            "up.bias": self.up_bias.mean(0),
        }


def _affine(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def _routed(x: torch.Tensor, weights: torch.Tensor, biases: torch.Tensor, experts: Sequence[int]) -> torch.Tensor:
    """Return the product of each equal part of the rows of x, (batch, ..., in), with its own expert."""
    if len(set(experts)) == 1:
        return _affine(x, weights[experts[0]], biases[experts[0]])
    parts = zip(x.chunk(len(experts)), experts, strict=True)
    return torch.cat([_affine(part, weights[e], biases[e]) for part, e in parts])


def experts_of(model: nn.Module) -> list[ExpertPerceptron]:
    """Return the adapters with experts, in the model's order."""
    return [module for module in model.modules() if isinstance(module, ExpertPerceptron)]


def set_routes(model: nn.Module, routes: Sequence[Sequence[Route]]) -> None:
    """Set the routes of both passes of every adapter, in the model's order; the next forward pass is a single one."""
    for module, own in zip(experts_of(model), routes, strict=True):
        module.routes, module.passes = own, 1


def two_passes(model: nn.Module) -> None:
    """Let forward passes until the next `set_routes` see every row twice: the first half of a batch is the second."""
    for module in experts_of(model):
        module.passes = 2
