"""A frozen linear layer and its LoRA as one operation: nothing as large as its output is made only to be added.

    y = W x + b + s B A x

Autograd's own way makes B A x beside W x and adds them, and in the backward pass A^T B^T g beside W^T g. On long rows
that is memory traffic, which takes longer than these products themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


def fits(base: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a layer is a plain frozen Linear of a type that nobody watches."""
    return (
        type(base) is nn.Linear
        and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
        and not base.weight.requires_grad
        and (base.bias is None or not base.bias.requires_grad)
        and base.weight.dtype == dtype
    )


class LoraProducts(torch.autograd.Function):
    """y = W x + b + s B A x, for W and b that do not train; keeps x, s A x, A and B in the type of x, and W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return y of shape (..., d_out).

        Args:
            ctx: The library's.
            x: (..., d_in).
            a: A, (r, d_in), of any type: its gradient has the same.
            b: B, (d_out, r), likewise.
            scale: s.
            weight: W, (d_out, d_in).
            bias: (d_out,), or None.
        """
        ctx.scale, ctx.types = scale, (a.dtype, b.dtype)
        rows, a, b = x.reshape(-1, x.shape[-1]), a.to(x.dtype), b.to(x.dtype)
        low = (rows @ a.T).mul_(scale)
        ctx.save_for_backward(rows, low, a, b, weight)
        return functional.linear(rows, weight, bias).addmm_(low, b.T).view(*x.shape[:-1], len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients of x, A and B."""
        rows, low, a, b, weight = ctx.saved_tensors
        g = upstream.reshape(-1, upstream.shape[-1])
        for_low = (g @ b).mul_(ctx.scale)
        for_x = for_a = for_b = None
        if ctx.needs_input_grad[0]:
            for_x = (g @ weight).addmm_(for_low, a).view(*upstream.shape[:-1], rows.shape[-1])
        if ctx.needs_input_grad[1]:
            for_a = (for_low.T @ rows).to(ctx.types[0])
        if ctx.needs_input_grad[2]:
            for_b = (low.T @ g).T.to(ctx.types[1])
        return for_x, for_a, for_b, None, None, None
