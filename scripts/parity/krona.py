"""KronA: W' = W + s (A kron B)."""

from __future__ import annotations

import torch

from scripts.parity._core import Fixture, Given, Values, normal
from scripts.parity._product import attach, passed, put

SCALE = 2.5

FIXTURE = Fixture(
    seed=2212,
    source="Edalati et al. 2022, arXiv 2212.10650, W + s (A kron B), the linear form",
    shapes="W (32, 32), A (4, 4), B (8, 8), x (2, 5, 32)",
    config={"factor": 4, "scale": SCALE, "target_modules": "all-linear"},
)


def given() -> Given:
    """Draw W, both factors, x and g; the shapes of the factors come from the fixture."""
    draw = FIXTURE.generator()
    return {
        "W": normal(draw, 32, 32, scale=0.2),
        "A": normal(draw, 4, 4),
        "B": normal(draw, 8, 8),
        "x": normal(draw, 2, 5, 32),
        "g": normal(draw, 2, 5, 32),
    }


def naive(given: Given) -> Values:
    """The Kronecker product entry by entry; its gradient collected block by block."""
    W, A, B, x, g = (given[name] for name in ("W", "A", "B", "x", "g"))
    (a1, a2), (b1, b2) = A.shape, B.shape
    full = torch.einsum("bto,bti->oi", g, x)
    delta, dA, dB = torch.zeros_like(W), torch.zeros_like(A), torch.zeros_like(B)
    for i in range(a1):
        for j in range(a2):
            block = (slice(i * b1, (i + 1) * b1), slice(j * b2, (j + 1) * b2))
            delta[block] = A[i, j] * B
            dA[i, j] = SCALE * (full[block] * B).sum()
            dB += SCALE * A[i, j] * full[block]
    whole = W + SCALE * delta
    y = torch.einsum("oi,bti->bto", whole, x)
    return Values({"y": y}, {"A": dA, "B": dB, "x": torch.einsum("oi,bto->bti", whole, g)})


def ours(given: Given) -> Values:
    """The layer, which never builds the product in training."""
    _, model = attach("krona", FIXTURE)
    layer = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    factors = {"A": layer.lokr_w1["default"], "B": layer.lokr_w2["default"]}
    put(given, {"W": layer.get_base_layer().weight, **factors})
    return passed(layer, given, factors)
