"""Gates that depend on the input: a part of an adapter is multiplied by a learned number in (0, 1).

token   g_t = σ(w . x_t + b), one for every position: it sees no other, so that nothing leaks from the future
mean    g = mean over the real positions t of σ(w . x_t + b), one for every row: for encoders
all     the same over all positions, padding among them

All read what the gated part reads, x of (batch, seq, d).
"""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import nn

from peftctl.tuners.perceptrons import affine, draw

Over = Literal["token", "mean", "all"]


class Padding:
    """What an encoder was told last of its padding."""

    def __init__(self) -> None:
        self.real: torch.Tensor | None = None

    def remember(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the stack of blocks runs: keep which positions are real, (batch, seq); None where all are."""
        mask = inspect.signature(stack.forward).bind_partial(*args, **kwargs).arguments.get("attention_mask")
        if mask is None and "attention_mask" in kwargs:
            mask = kwargs["attention_mask"]
        if mask is not None and mask.dim() == 4:  # (batch, 1, queries, keys): True, or 0, where a key may be seen
            seen = mask if mask.dtype == torch.bool else mask == 0
            mask = seen[:, 0].any(dim=1)
        self.real = None if mask is None else mask.bool()


class Gate(nn.Module):
    """One row w and a number b.

    Args:
        width: d, of what it reads.
        over: What it is a mean over.
        std: Standard deviation of w at the start, b being 0; None draws both as a new linear layer.
        padding: Of the encoder, for `mean`.
    """

    def __init__(self, width: int, over: Over, std: float | None = None, padding: Padding | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        if std is not None:
            draw(self.linear.weight, std)
            nn.init.zeros_(self.linear.bias)
        self.over = over
        self.padding = padding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return g for x of (batch, seq, d): (batch, seq, 1) for `token`, else (batch, 1, 1)."""
        gates = torch.sigmoid(affine(x, self.linear))
        if self.over == "token":
            return gates
        real = self.padding.real if self.over == "mean" and self.padding is not None else None
        if real is None:
            return gates.mean(dim=-2, keepdim=True)
        weight = real.to(gates)[..., None]
        return (gates * weight).sum(dim=-2, keepdim=True) / weight.sum(dim=-2, keepdim=True).clamp(min=1)
