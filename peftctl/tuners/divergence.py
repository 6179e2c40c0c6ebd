"""How far two predictions of the same tokens are apart, and a gradient that pulls each towards the other.

    1/2 [KL(p || q) + KL(q || p)],   p = softmax(z), q = softmax(z'),   the target of each part is a constant

KL(p || q) with p constant has the gradient q - p in z', so that the sum has 1/2 (p - q) in z and its negative in z'.
Only the logits are kept for the backward pass; they are widened to float32 a chunk of rows at a time.
"""

from __future__ import annotations

from typing import Any

import torch

_CHUNK = 1024
"""Rows of logits that are widened to float32 at a time."""


def symmetric_divergence(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the scalar sum over rows of 1/2 [KL(p || q) + KL(q || p)], in float32 or wider.

    Args:
        first: z, (n, classes); n may be 0.
        second: z', of the same shape.
    """
    return _SymmetricDivergence.apply(first, second)  # type: ignore[no-any-return]


class _SymmetricDivergence(torch.autograd.Function):
    """The sum, with a gradient in which each target is a constant."""

    @staticmethod
    def forward(ctx: Any, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(first, second)
        parts = []
        for z, other in zip(first.split(_CHUNK), second.split(_CHUNK), strict=True):
            log_p, log_q = _log_softmax(z), _log_softmax(other)
            parts.append(((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum())
        return torch.stack(parts).sum() / 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        first, second = ctx.saved_tensors
        gradient = torch.empty_like(first)
        for begin in range(0, len(first), _CHUNK):
            rows = slice(begin, begin + _CHUNK)
            apart = _log_softmax(first[rows]).exp_() - _log_softmax(second[rows]).exp_()
            gradient[rows] = apart.mul_(upstream / 2)
        return gradient, -gradient


def _log_softmax(rows: torch.Tensor) -> torch.Tensor:
    return rows.log_softmax(-1, dtype=torch.promote_types(rows.dtype, torch.float32))
