"""Norms and gated feed-forward parts of training steps that keep less for the backward pass than the library's.

    n = x / sqrt(mean(x^2) + e),   y = w n          (RMSNorm: Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4)
    y = W_down (silu(g) u),   g = W_gate x,   u = W_up x    (SwiGLU: Shazeer 2020, arXiv 2002.05202, eq. 6)

The library's norm keeps x in float32; this one keeps x as it comes. The gated product keeps g and u, and makes silu(g)
again. Which modules compute just this is not taken from their names: a module's class is tried on numbers first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

Forward = Callable[[torch.Tensor], torch.Tensor]
_TRIED = (3, 8)


def lean_forwards(model: nn.Module) -> list[tuple[nn.Module, Forward]]:
    """Return the modules of a model that have a leaner forward pass, with it."""
    found: list[tuple[nn.Module, Forward]] = []
    for module in model.modules():
        if "forward" in vars(module):  # somebody else's
            continue
        kind: Any = type(module)
        if (epsilon := _epsilon(module)) is not None and _is_rms_norm(kind):
            found.append((module, partial(_norm, module, epsilon)))
        elif _is_gated(module):
            found.append((module, partial(_gated, module)))
    return found


@contextmanager
def lean_blocks(forwards: Iterable[tuple[nn.Module, Forward]]) -> Iterator[None]:
    """Let modules run these forward passes for a while, backward included."""
    forwards = list(forwards)
    for module, forward in forwards:
        module.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for module, _ in forwards:
            del module.forward


# -- RMSNorm ---------------------------------------------------------------------------------------------------------


def _epsilon(module: nn.Module) -> float | None:
    """Return e of a module that may be an RMSNorm."""
    if [name for name, _ in module.named_parameters()] != ["weight"] or next(module.parameters()).dim() != 1:
        return None
    epsilon = vars(module).get("variance_epsilon", vars(module).get("eps"))
    return epsilon if isinstance(epsilon, float) else None


@cache
def _is_rms_norm(kind: Any) -> bool:
    """Tell whether a class of modules computes the equation, by trying it on numbers."""
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(_TRIED, generator=draw), torch.randn(_TRIED[1:], generator=draw)
    return _computes(
        lambda: kind.forward(SimpleNamespace(weight=weight, variance_epsilon=0.1, eps=0.1), x),
        lambda: RmsNorm.apply(x, weight, 0.1),
    )


def _computes(theirs: Callable[[], Any], ours: Callable[[], torch.Tensor]) -> bool:
    try:
        found = theirs()
    except Exception:  # it needs more than the equation has
        return False
    return isinstance(found, torch.Tensor) and torch.allclose(found, ours(), rtol=1e-5, atol=1e-6)


def _norm(module: Any, epsilon: float, x: torch.Tensor) -> torch.Tensor:
    if x.requires_grad and x.dtype == module.weight.dtype:
        return RmsNorm.apply(x, module.weight, epsilon)
    return type(module).forward(module, x)


class RmsNorm(torch.autograd.Function):
    """y = w n, with n rounded to the type of x as in the library."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Return y, (..., d).

        Args:
            ctx: The library's.
            x: (..., d).
            weight: w, (d,).
            epsilon: e.
        """
        wide = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        scale = wide.square().mean(dim=-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return wide.mul_(scale).to(x.dtype) * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:  # type: ignore[override]
        """Return dx = s (dn - n mean(dn n)) and dw = Σ dy n, with dn = w dy and s = 1 / sqrt(mean(x^2) + e)."""
        x, weight, scale = ctx.saved_tensors
        n = x.to(scale.dtype, copy=True).mul_(scale)
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (upstream * n).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, d_weight, None
        d_n = (upstream * weight).to(scale.dtype)
        mean = torch.linalg.vecdot(d_n, n).unsqueeze(-1).div_(x.shape[-1])
        return d_n.sub_(n.mul_(mean)).mul_(scale).to(x.dtype), d_weight, None


# -- SwiGLU ----------------------------------------------------------------------------------------------------------


def _is_gated(module: nn.Module) -> bool:
    parts = vars(module)["_modules"]
    if not {"gate_proj", "up_proj", "down_proj", "act_fn"} <= set(parts):
        return False
    act: Any = parts["act_fn"]
    kinds: Any = type(module), type(act)
    return not (act._forward_hooks or act._forward_pre_hooks) and _is_swiglu(*kinds)


@cache
def _is_swiglu(kind: Any, act: Any) -> bool:
    """Tell whether a class of modules with a class of activations computes the equation, by trying both on numbers."""
    x = torch.randn(_TRIED, generator=torch.Generator().manual_seed(0))
    gate, up, down = (partial(torch.mul, torch.tensor(number)) for number in (0.3, 0.5, 2.0))
    parts = SimpleNamespace(
        gate_proj=gate, up_proj=up, down_proj=down, act_fn=lambda z: act.forward(SimpleNamespace(), z)
    )
    return _computes(lambda: kind.forward(parts, x), lambda: down(Gated.apply(gate(x), up(x))))


def _gated(module: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    return module.down_proj(Gated.apply(gate, up))


class Gated(torch.autograd.Function):
    """silu(g) u."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return silu(g) u for g and u of shape (..., d)."""
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """Return dg = dy u silu'(g) and du = dy silu(g)."""
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(upstream * up, gate), functional.silu(gate).mul_(upstream)
