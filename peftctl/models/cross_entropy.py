"""The summed cross-entropy of logits, and of the states before a frozen head, a piece of the rows at a time.

    Σ logsumexp(z) - (1-ε) z[label] - ε mean(z),   dz = softmax(z) - (1-ε) onehot(label) - ε/vocab

which is the cross-entropy to (1-ε) onehot(label) + ε uniform: label smoothing as in Szegedy et al. 2015
(arXiv 1512.00567), section 7. No more than `CHUNK` logits are ever there in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

CHUNK = {"cpu": 1 << 20, "gpu": 1 << 24}
"""Logits that are widened to float32 at a time: on CPUs as many as the caches hold."""
PIECE = {"cpu": 1 << 24, "gpu": 1 << 26}
"""Logits that a frozen head makes at a time: enough rows for a fast product."""


class SummedCrossEntropy(torch.autograd.Function):
    """The cross-entropy of logits that are there; backward keeps their (n,) log-sums beside them."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
        """Return the scalar sum.

        Args:
            ctx: The library's.
            logits: z, (n, vocab).
            labels: (n,).
            smoothing: ε.
        """
        sums, total = [], logits.new_zeros((), dtype=_wide(logits))
        for rows in _spans(logits, CHUNK):
            wide = logits[rows].to(total.dtype)
            sums.append(torch.logsumexp(wide, dim=-1))
            total += (sums[-1] - _targets(wide, labels[rows], smoothing)).sum()
        ctx.save_for_backward(logits, labels, torch.cat(sums) if sums else total.new_empty(0))
        ctx.smoothing = smoothing
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        """Return dz, (n, vocab)."""
        logits, labels, sums = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for rows in _spans(logits, CHUNK):
            log_p = logits[rows].to(sums.dtype, copy=True).sub_(sums[rows, None])
            gradient[rows] = _derivative_(log_p, labels[rows], ctx.smoothing).mul_(upstream)
        return gradient, None, None


class HeadCrossEntropy(torch.autograd.Function):
    """The cross-entropy of z = W x + b with W and b frozen: forward makes dx too, and keeps nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        smoothing: float,
    ) -> torch.Tensor:
        """Return the scalar sum.

        Args:
            ctx: The library's.
            states: x, (n, d).
            weight: W, (vocab, d).
            bias: b, (vocab,), or None.
            labels: (n,).
            smoothing: ε.
        """
        gradient, total = torch.empty_like(states), states.new_zeros((), dtype=_wide(states))
        for piece in _spans(states, PIECE, len(weight)):
            logits, its_labels = functional.linear(states[piece], weight, bias), labels[piece]
            for rows in _spans(logits, CHUNK):
                log_p = torch.log_softmax(logits[rows], dim=-1, dtype=total.dtype)
                total -= _targets(log_p, its_labels[rows], smoothing).sum()
                logits[rows] = _derivative_(log_p, its_labels[rows], smoothing)
            torch.mm(logits, weight, out=gradient[piece])
            del logits  # before the next piece is made
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Return dx = W^T dz, (n, d)."""
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None, None


def _targets(wide: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Return (1-ε) z[label] + ε mean(z) of each row."""
    targets = wide.gather(1, labels[:, None])[:, 0]
    return targets.lerp(wide.mean(dim=-1), smoothing) if smoothing else targets


def _derivative_(log_p: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Return dz in place of z - logsumexp(z)."""
    log_p.exp_()
    if smoothing:
        log_p.sub_(smoothing / log_p.shape[1])
    return log_p.scatter_add_(1, labels[:, None], log_p.new_full((len(log_p), 1), smoothing - 1.0))


def _spans(rows: torch.Tensor, sizes: dict[str, int], width: int | None = None) -> Iterator[slice]:
    """Yield the rows, equally many at a time, at most as many as have that many numbers of their width."""
    most = max(1, sizes["cpu" if rows.device.type == "cpu" else "gpu"] // (width or rows.shape[1]))
    size = -(-len(rows) // max(1, -(-len(rows) // most)))
    return (slice(first, first + size) for first in range(0, len(rows), max(1, size)))


def _wide(logits: torch.Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)
