"""The side network of ladder side-tuning: rungs that read the base's stream, each a gate and a narrow block.

    s_0 = Down_0(h_0);   s <- μ_i s + (1 - μ_i) Down_i(h_i),   μ_i = σ(α_i / T);   s <- Block_i(s);   out = Up(norm(s))

The tensors are float32 for the optimizer. Over a half type the side runs under autocast, so that the stream, which the
down-projections keep for their gradients, is kept in the base's type.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Call:
    """What a block of the base was called with, and the stream.

    Args:
        h: (batch, seq, d), without a graph: what the block returned, or for the first entry what it was given.
        args: Positional arguments but the stream.
        kwargs: Named arguments.
    """

    h: torch.Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class Rung(nn.Module):
    """One step of the ladder: α, Down and the narrow block.

    Args:
        width: d.
        narrow: d / r.
        block: Of the base's class.
        temperature: T.
    """

    def __init__(self, width: int, narrow: int, block: nn.Module, temperature: float):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))
        self.down = nn.Linear(width, narrow)
        self.block = block
        self.temperature = temperature

    def mu(self) -> torch.Tensor:
        """Return μ, (1,): the share of the side's own state."""
        return torch.sigmoid(self.gate / self.temperature)

    def forward(self, s: torch.Tensor, call: Call) -> torch.Tensor:
        """Return the next state, (batch, seq, d / r)."""
        mu = self.mu().to(s.dtype)
        result = self.block(mu * s + (1 - mu) * self.down(call.h), *call.args, **call.kwargs)
        return result[0] if isinstance(result, tuple) else result


class Side(nn.Module):
    """The whole side network.

    Args:
        width: d.
        narrow: d / r.
        blocks: Narrow blocks, one for each rung.
        norm: The narrow final norm.
        layers: Which block of the base each rung reads, ascending.
        temperature: T.
        zero_up: Let Up start at 0.
    """

    def __init__(
        self,
        width: int,
        narrow: int,
        blocks: list[nn.Module],
        norm: nn.Module,
        layers: list[int],
        temperature: float,
        zero_up: bool,
    ):
        super().__init__()
        self.layers = layers
        self.down = nn.Linear(width, narrow)
        self.rungs = nn.ModuleList(Rung(width, narrow, block, temperature) for block in blocks)
        self.norm = norm
        self.up = nn.Linear(narrow, width)
        if zero_up:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, entry: Call, calls: Mapping[int, Call]) -> torch.Tensor:
        """Return Up(norm(s)), (batch, seq, d), in the type of the stream.

        Args:
            entry: What the first block was given.
            calls: Block -> its call; one that was skipped leaves the stream as it was.
        """
        dtype = entry.h.dtype
        half = dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(entry.h.device.type, dtype) if half else nullcontext():
            s, call = self.down(entry.h), entry
            for rung, layer in zip(self.rungs, self.layers, strict=False):
                call = calls.get(layer, call)
                s = rung(s, call)
            return self.up(self.norm(s)).to(dtype)
