"""A bottleneck adapter of which only chosen entries of D and U exist: the others are 0 and have no parameter.

    change(h) = U φ(D h + b1) + b2,   [D; U] = scatter(indices, values),   values: (k,) float32; k differs by adapter

The flat vector of both matrices, (2dm,), has D's entries first, row after row, then U's. Biases are whole. What has no
parameter stays 0 whatever weight decay, moments, clipping or accumulation do. The matrices are made anew in the forward
pass: the products are those of dense ones, and take as long.

An adapter remembers all entries as they were drawn (`start`) until its own are chosen; before that as many as are to
train, spread evenly, stand in for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

from peftctl.tuners.perceptrons import Perceptron


class SparsePerceptron(nn.Module):
    """The entries of one adapter, drawn as those of a `Perceptron`.

    Args:
        width: d.
        config: Of `bottleneck.py`.
    """

    start: torch.Tensor | None
    indices: torch.Tensor

    def __init__(self, width: int, config: Any) -> None:
        super().__init__()
        dense = Perceptron(width, config)
        self.down_bias, self.up_bias = dense.down.bias, dense.up.bias
        self.activation = ACT2FN[config.activation]
        self.size = dense.down.weight.numel() + dense.up.weight.numel()
        drawn = torch.cat([dense.down.weight.detach().flatten(), dense.up.weight.detach().flatten()])
        self.register_buffer("start", drawn, persistent=False)
        self.register_buffer("indices", torch.arange(self.size))
        self.values = nn.Parameter(drawn.clone())

    def drawn(self) -> torch.Tensor:
        """Return all entries as they were drawn, (2dm,), as long as none are chosen."""
        assert self.start is not None
        return self.start.to(self.values.dtype)  # peft gives buffers, other than what trains, the base's type

    def stand_in(self, k: int) -> None:
        """Let k entries train that are spread evenly."""
        drawn = self.drawn()
        self.indices = torch.arange(k, device=drawn.device) * self.size // k
        self.values = nn.Parameter(drawn[self.indices])

    def keep(self, indices: torch.Tensor) -> None:
        """Let these entries train from now on: (k,), ascending, from where they were drawn, if that is known."""
        self.indices = indices.to(self.values.device)
        values = self.values.new_zeros(len(indices)) if self.start is None else self.drawn()[self.indices]
        self.values, self.start = nn.Parameter(values), None

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Return the change for h of shape (..., d), in its type."""
        return self.change(h, self.flat())

    def change(self, h: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        """Return the change for h of shape (..., d), in its type, if the entries were these: (2dm,)."""
        down, up = self.matrices(flat)
        low = functional.linear(h, down.to(h.dtype), self.down_bias.to(h.dtype))
        return functional.linear(self.activation(low), up.to(h.dtype), self.up_bias.to(h.dtype))

    def flat(self) -> torch.Tensor:
        """Return all entries: (2dm,), with their graph."""
        return self.values.new_zeros(self.size).scatter(0, self.indices, self.values)

    def matrices(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return D: (m, d) and U: (d, m) of all entries."""
        down, up = flat.chunk(2)
        return down.view(len(self.down_bias), -1), up.view(len(self.up_bias), -1)

    def plain_tensors(self) -> dict[str, torch.Tensor]:
        """Return the plain adapter that this is, by the names of `Perceptron`'s tensors."""
        down, up = self.matrices(self.flat())
        tensors = {"down.weight": down, "down.bias": self.down_bias, "up.weight": up, "up.bias": self.up_bias}
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def sparse_adapters(peft_model: Any) -> Iterator[tuple[str, SparsePerceptron]]:
    """Yield the adapters with the names of the layers that they follow."""
    for name, module in peft_model.get_base_model().named_modules():
        if isinstance(module, SparsePerceptron):
            yield name.rsplit(".", 2)[0], module


def place(peft_model: Any, indices: Mapping[str, torch.Tensor]) -> None:
    """Fix which entries train, by the names of the layers that adapters follow."""
    for name, module in sparse_adapters(peft_model):
        module.keep(indices[name])
