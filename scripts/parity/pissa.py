"""PiSSA: the top r singular directions train, the rest is frozen."""

from __future__ import annotations

import torch

from scripts.parity._core import Fixture, Given, Values, normal
from scripts.parity._product import attach, passed, put
from tests.tiny import tiny_llama

FIXTURE = Fixture(
    seed=2404,
    source="Meng, Wang, Zhang 2024, arXiv 2404.02948, "
    "A = S_r^1/2 V_r^T, B = U_r S_r^1/2, W_res = W - B A; s B A is the top part for any alpha",
    shapes="W (64, 32), x (2, 5, 32), r 3",
    config={"r": 3, "alpha": 6, "target_modules": "all-linear"},
    tolerance=1e-5,
    reason="W is decomposed in float32",
)


def given() -> Given:
    """Draw W with singular values 3.2, 3.1, ... 0.1, x and g; the factors follow from W."""
    draw = FIXTURE.generator()
    left, right = (torch.linalg.qr(normal(draw, side, 32))[0] for side in (64, 32))
    return {
        "W": left @ torch.diag(torch.arange(32, 0, -1, dtype=torch.float64) / 10) @ right.T,
        "x": normal(draw, 2, 5, 32),
        "g": normal(draw, 2, 5, 64),
    }


def naive(given: Given) -> Values:
    """Singular pairs from eigenvectors of W^T W. Their signs are free: what is compared doesn't depend on them."""
    W, x, g = (given[name] for name in ("W", "x", "g"))
    values, vectors = torch.linalg.eigh(W.T @ W)
    largest = [31, 30, 29]
    singular = values[largest].sqrt()
    right = vectors[:, largest].T
    left = (W @ right.T) / singular
    scale = 6 / 3
    B, A = left * (singular / scale).sqrt(), (singular / scale).sqrt()[:, None] * right
    residual = W - scale * (B @ A)
    full = torch.einsum("bto,bti->oi", g, x)
    outputs = {
        "s B A": scale * (B @ A),
        "W_res": residual,
        "s A A^T": scale * (A @ A.T),
        "s B^T B": scale * (B.T @ B),
        "y": torch.einsum("oi,bti->bto", W, x),
    }
    return Values(outputs, {"B dA": scale * B @ B.T @ full, "dB A": scale * full @ A.T @ A})


def ours(given: Given) -> Values:
    """Apply the method to a model whose layer holds W; the product takes the start away beside W, not from it."""
    base = tiny_llama(dtype="float64")
    linear = base.model.layers[1].mlp.gate_proj
    put(given, {"W": linear.weight})
    _, model = attach("pissa", FIXTURE, base)
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.gate_proj")
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    E, F = layer.fixed_factors.E, layer.fixed_factors.F
    found = passed(layer, given, {"A": A, "B": B})
    scale = 6 / 3
    outputs = {
        "s B A": scale * (B @ A),
        "W_res": linear.weight + scale * (F @ E),
        "s A A^T": scale * (A @ A.T),
        "s B^T B": scale * (B.T @ B),
        "y": found.outputs["y"],
    }
    return Values(outputs, {"B dA": B @ found.gradients["A"], "dB A": found.gradients["B"] @ A})
