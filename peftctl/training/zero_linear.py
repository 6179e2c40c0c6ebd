"""Linear layers that keep no gathered weight alive, for ZeRO-3.

PyTorch saves a view of the weight for the backward pass. DeepSpeed frees a gathered weight by giving the parameter an
empty tensor, and the view outlives that: at the end of the forward pass the whole model is there. Here the parameter
itself is saved, which is gathered again for its backward pass. DeepSpeed's own layer does the same, but keeps the
input of frozen weights too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

_PLAIN = functional.linear
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class _Linear(torch.autograd.Function):
    """y = x W^T + b: x (..., d_in), W (d_out, d_in), b (d_out)."""

    @staticmethod
    @torch.amp.custom_fwd(device_type=_DEVICE)
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        for_x, for_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None)
        return _PLAIN(x, weight, bias)

    @staticmethod
    @torch.amp.custom_bwd(device_type=_DEVICE)
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = upstream.reshape(-1, upstream.shape[-1])
        return (
            upstream @ weight if for_x else None,
            rows.T @ x.reshape(-1, x.shape[-1]) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x W^T + b, as `torch.nn.functional.linear` does: x (..., d_in), W (d_out, d_in), b (d_out)."""
    return _Linear.apply(x, weight, bias)


def install() -> None:
    """Let every linear layer compute so, until `remove`."""
    functional.linear = linear  # type: ignore[assignment]


def remove() -> None:
    """Give PyTorch its own function back."""
    functional.linear = _PLAIN
