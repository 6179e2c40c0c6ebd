"""What a bottleneck adapter computes: a small perceptron. Where it stands is `bottleneck.py`'s affair.

    change(h) = U φ(D h + b1) + b2,   D: (m, d), b1: (m,), U: (d, m), b2: (d,), h: (..., d)

The tensors are float32 for the optimizer and are cast to the type of h: h itself is never copied to float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN


class Perceptron(nn.Module):
    """D, U and their biases.

    D is drawn from a normal distribution cut off at two deviations, or Kaiming-uniformly as a new `nn.Linear`; U is
    drawn likewise where `up_std` is set, else it is 0, as the biases always are: the adapter then starts as a no-op.

    Args:
        width: d.
        config: Of `bottleneck.py`: m, φ and the deviations.
    """

    def __init__(self, width: int, config: Any) -> None:
        super().__init__()
        self.down = nn.Linear(width, config.bottleneck)
        self.up = nn.Linear(config.bottleneck, width)
        self.activation = ACT2FN[config.activation]
        draw(self.down.weight, config.init_std)
        draw(self.up.weight, config.up_std)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Return U φ(D h + b1) + b2 for h of shape (..., d), in the type of h."""
        return affine(self.activation(affine(h, self.down)), self.up)


def affine(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """Return W x + b in the type of x."""
    return functional.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def draw(weight: torch.Tensor, std: float | None) -> None:
    """Fill a matrix: normal and cut off at two deviations; 0 for a deviation of 0; as a new layer for None."""
    if std is None:
        nn.init.kaiming_uniform_(weight, a=5**0.5)
    elif std == 0:
        nn.init.zeros_(weight)
    else:
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
