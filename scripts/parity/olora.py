"""OLoRA: B and A from the first r columns and rows of W = Q R, the base keeps the rest."""

from __future__ import annotations

import torch

from scripts.parity._core import Fixture, Given, Values, normal
from scripts.parity._product import attach, passed, put
from tests.tiny import tiny_llama

FIXTURE = Fixture(
    seed=2406,
    source="Büyükakyüz 2024, arXiv 2406.01775, W = Q R, B = Q_r, A = R_r, W <- W - s B A",
    shapes="W (64, 32), x (2, 5, 32), r 3",
    config={"r": 3, "alpha": 6, "target_modules": "all-linear"},
    tolerance=2e-6,
    reason="W is decomposed in float32",
)


def given() -> Given:
    """Draw W, x and g; the factors follow from W."""
    draw = FIXTURE.generator()
    return {
        "W": normal(draw, 64, 32, scale=0.2),
        "x": normal(draw, 2, 5, 32),
        "g": normal(draw, 2, 5, 64),
    }


def naive(given: Given) -> Values:
    """Gram-Schmidt, column by column. Signs of Q's columns are free: what is compared doesn't depend on them."""
    W, x, g = (given[name] for name in ("W", "x", "g"))
    columns: list[torch.Tensor] = []
    for j in range(3):
        rest = W[:, j].clone()
        for _ in range(2):  # twice is enough for float64
            for earlier in columns:
                rest -= torch.dot(earlier, rest) * earlier
        columns.append(rest / rest.norm())
    B = torch.stack(columns, dim=1)
    A = B.T @ W
    scale = 6 / 3
    full = torch.einsum("bto,bti->oi", g, x)
    outputs = {
        "B A": B @ A,
        "base": W - scale * (B @ A),
        "B^T B": torch.eye(3, dtype=W.dtype),
        "|A|": A.abs(),
        "below the diagonal of A": torch.zeros(3, dtype=W.dtype),
        "y": torch.einsum("oi,bti->bto", W, x),
    }
    return Values(outputs, {"B dA": scale * B @ B.T @ full, "dB A": scale * full @ A.T @ A})


def ours(given: Given) -> Values:
    """Apply the method to a model whose layer holds W; the product takes the start away beside W, not from it."""
    base = tiny_llama(dtype="float64")
    linear = base.model.layers[1].mlp.gate_proj
    put(given, {"W": linear.weight})
    _, model = attach("olora", FIXTURE, base)
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.gate_proj")
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    E, F = layer.fixed_factors.E, layer.fixed_factors.F
    found = passed(layer, given, {"A": A, "B": B})
    scale = 6 / 3
    outputs = {
        "B A": B @ A,
        "base": linear.weight + scale * (F @ E),
        "B^T B": B.T @ B,
        "|A|": A.abs(),
        "below the diagonal of A": torch.stack([A[1, 0], A[2, 0], A[2, 1]]),
        "y": found.outputs["y"],
    }
    return Values(outputs, {"B dA": B @ found.gradients["A"], "dB A": found.gradients["B"] @ A})
