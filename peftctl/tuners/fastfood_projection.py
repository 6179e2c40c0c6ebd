"""Fastfood projections (Le, Sarlos and Smola 2013, https://arxiv.org/abs/1408.3060) of one small vector z.

    P z = S H G Π H B z / sqrt(D sum_k G_kk^2),   P: (D, len z), n the next power of two to D

B: random signs (z is padded with zeros to n, or cut off there), H: the Walsh-Hadamard matrix of entries ±1, Π: a
permutation, G: Gaussian, S: the first D entries. Where D is a power of two, P has columns of norm 1.

z has few entries, so the first H is one of `width` entries, repeated n / width times. Nothing of size D is kept for the
backward pass: P^T v takes the transforms again, and the gradient of a scale is that of z times z. The references'
hand-written backward scales every transform by 1/sqrt(n); ours has none of it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

_RADIX = 64
"""Side of the matrices that H is a Kronecker product of: few passes over memory, and still few operations."""


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Return H x for x of shape (n,), n a power of two; H H = n, and H is its own transpose."""
    left = len(x)
    matrix = _matrix(min(left, _RADIX), x)
    with torch.autocast(x.device.type, enabled=False):
        while left > 1:
            side = min(left, _RADIX)
            # The leading axis is transformed and becomes the last one; after the last factor all are in place again.
            x = (x.view(side, -1).T @ matrix[:side, :side]).flatten()
            left //= side
    return x


def _matrix(side: int, like: torch.Tensor) -> torch.Tensor:
    matrix = like.new_ones(1, 1)
    while len(matrix) < side:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is not below a size."""
    return 1 << max(0, size - 1).bit_length()


@dataclass(frozen=True)
class Drawn:
    """The random parts of one layer's P, on the CPU: Π moves entry k to positions[k].

    Args:
        positions: (n,), of int32.
        gaussian: (n,), rounded to float16: that is what G is, everywhere.
        signs: (width,), of int8.
    """

    positions: torch.Tensor
    gaussian: torch.Tensor
    signs: torch.Tensor


def draw(seed: int, place: int, size: int, length: int) -> Drawn:
    """Draw B, Π and G of a layer.

    Args:
        seed: Of the adapter.
        place: Of the layer in its order.
        size: D.
        length: Entries of z.
    """
    n = power_of_two(size)
    digest = hashlib.blake2b(f"{seed}/{place}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    positions = torch.randperm(n, generator=generator, device="cpu").int()
    gaussian = torch.randn(n, generator=generator, device="cpu", dtype=torch.float32).half()
    width = min(n, power_of_two(length))
    signs = torch.randint(0, 2, (width,), generator=generator, device="cpu") * 2 - 1
    return Drawn(positions, gaussian, signs.to(torch.int8))


def blank(size: int, length: int) -> Drawn:
    """Return tables without values, for plans of models without weights; for the arguments see `draw`."""
    n = power_of_two(size)
    kinds = ((n, torch.int32), (n, torch.float16), (min(n, power_of_two(length)), torch.int8))
    return Drawn(*(torch.empty(entries, dtype=kind, device="meta") for entries, kind in kinds))


def fingerprint(drawn: Drawn) -> str:
    """Return what tells two draws apart: of Π and the signs of B and G, which no rounding changes."""
    parts = (drawn.positions, drawn.signs, drawn.gaussian < 0)
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()[:16]


class Projection(nn.Module):
    """λ P z of one layer. Its tables take 6 bytes for each of n entries.

    Args:
        drawn: B, Π and G.
        size: D.
        device: Of the tables; on `meta` they have no values.
    """

    def __init__(self, drawn: Drawn, size: int, device: torch.device):
        super().__init__()
        self.size = size
        self.norm = 1.0
        if drawn.gaussian.device.type != "meta":
            self.norm = float(size * drawn.gaussian.double().square().sum()) ** 0.5
        # As bits: a cast of the whole model to bfloat16 must not round G.
        bits = drawn.gaussian.view(torch.int16)
        for name, table in (("positions", drawn.positions), ("bits", bits), ("signs", drawn.signs)):
            self.register_buffer(name, table.to(device), persistent=False)

    def forward(self, z: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return λ P z of shape (D,), in float32 or wider, for z of any length and a scale of shape ()."""
        z, scale = z.to(self.positions.device), scale.to(self.positions.device)  # type: ignore[arg-type]
        return _Project.apply(z, scale, self.positions, self.bits, self.signs, self.size, self.norm)


class _Project(torch.autograd.Function):
    """λ P z, with λ P^T v and (P^T v)·z for its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        z: torch.Tensor,
        scale: torch.Tensor,
        positions: torch.Tensor,
        bits: torch.Tensor,
        signs: torch.Tensor,
        size: int,
        norm: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(z, scale, positions, bits, signs)
        ctx.norm = norm
        wide = torch.promote_types(z.dtype, torch.float32)
        n, width = len(positions), len(signs)
        few = z[:width].to(wide)
        few = hadamard(functional.pad(few, (0, width - len(few))) * signs)
        moved = few.new_empty(n).index_copy_(0, positions.long(), few.repeat(n // width))
        return hadamard(moved * _gaussian(bits, wide))[:size] * (scale.to(wide) / norm)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        z, scale, positions, bits, signs = ctx.saved_tensors
        n, width = len(positions), len(signs)
        v = functional.pad(upstream, (0, n - len(upstream)))
        moved = (hadamard(v) * _gaussian(bits, v.dtype)).index_select(0, positions)
        few = hadamard(moved.view(-1, width).sum(0)) * signs / ctx.norm
        few = few[: len(z)]
        few = functional.pad(few, (0, len(z) - len(few)))
        for_scale = (few * z).sum().to(scale.dtype) if ctx.needs_input_grad[1] else None
        return (few * scale).to(z.dtype), for_scale, None, None, None, None, None


def _gaussian(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return bits.view(torch.float16).to(dtype)
