"""KronA_B and KronA_Bres: y = FFN(x) + s (A kron B) x + l x, beside whole feed-forward blocks; B is the case l = 0."""

from __future__ import annotations

import torch

from scripts.parity._core import Fixture, Given, Values, normal
from scripts.parity._product import attach, linear_layer, passed, put

SCALE = 2.5

FIXTURE = Fixture(
    seed=2213,
    source="Edalati et al. 2022, arXiv 2212.10650, KronA_Bres: parallel to the FFN, with a learned multiple of x",
    shapes="SwiGLU block of W (64, 32), (64, 32), (32, 64), A (4, 4), B (8, 8), l (1,), x (2, 5, 32)",
    config={"factor": 4, "scale": SCALE, "variant": "Bres"},
)


def given() -> Given:
    """Draw the block, both factors, l, x and g."""
    draw = FIXTURE.generator()
    return {
        "gate": normal(draw, 64, 32, scale=0.2),
        "up": normal(draw, 64, 32, scale=0.2),
        "down": normal(draw, 32, 64, scale=0.2),
        "A": normal(draw, 4, 4),
        "B": normal(draw, 8, 8),
        "l": normal(draw, 1),
        "x": normal(draw, 2, 5, 32),
        "g": normal(draw, 2, 5, 32),
    }


def naive(given: Given) -> Values:
    """The product entry by entry; gradients by the chain rule, the block's own derivative written out."""
    A, B, residual, x, g = (given[name] for name in ("A", "B", "l", "x", "g"))
    gate, up, down = (given[name] for name in ("gate", "up", "down"))
    (a1, a2), (b1, b2) = A.shape, B.shape
    full = torch.einsum("bto,bti->oi", g, x)
    whole, dA, dB = torch.zeros(32, 32, dtype=x.dtype), torch.zeros_like(A), torch.zeros_like(B)
    for i in range(a1):
        for j in range(a2):
            block = (slice(i * b1, (i + 1) * b1), slice(j * b2, (j + 1) * b2))
            whole[block] = SCALE * A[i, j] * B
            dA[i, j] = SCALE * (full[block] * B).sum()
            dB += SCALE * A[i, j] * full[block]
    y, dx = torch.zeros_like(g), torch.zeros_like(x)
    for row in range(x.shape[0]):
        for token in range(x.shape[1]):
            here, back = x[row, token], g[row, token]
            a, b = gate @ here, up @ here
            share = 1 / (1 + torch.exp(-a))
            y[row, token] = down @ (a * share * b) + whole @ here + residual * here
            inner = down.T @ back
            slope = share * (1 + a * (1 - share))
            dx[row, token] = (
                gate.T @ (inner * b * slope) + up.T @ (inner * a * share) + whole.T @ back + residual * back
            )
    return Values({"y": y}, {"A": dA, "B": dB, "l": (g * x).sum()[None], "x": dx})


def ours(given: Given) -> Values:
    """The whole block of a model that the method was applied to."""
    _, model = attach("krona", FIXTURE)
    block = linear_layer(model, "model.layers.1.mlp")
    beside = block.down_proj
    trained = {
        "A": beside.kron_block_a["default"],
        "B": beside.kron_block_b["default"],
        "l": beside.kron_block_l["default"],
    }
    bases = {"gate": block.gate_proj.weight, "up": block.up_proj.weight, "down": beside.base_layer.weight}
    put(given, {**trained, **bases})
    return passed(block, given, trained)
