"""LoRA: y = W x + (alpha / r) B A x."""

from __future__ import annotations

import torch

from scripts.parity._core import Fixture, Given, Values, normal
from scripts.parity._product import attach, lora_layer, passed

FIXTURE = Fixture(
    seed=2106,
    source="Hu et al. 2021, arXiv 2106.09685, equation 3",
    shapes="W (64, 32), x (2, 5, 32), r 3",
    config={"r": 3, "alpha": 7, "target_modules": "all-linear"},
)


def numbers(fixture: Fixture) -> Given:
    """Draw W, A, B, the input x and the gradient g of the output."""
    draw = fixture.generator()
    return {
        "W": normal(draw, 64, 32, scale=0.2),
        "A": normal(draw, 3, 32),
        "B": normal(draw, 64, 3),
        "x": normal(draw, 2, 5, 32),
        "g": normal(draw, 2, 5, 64),
    }


def given() -> Given:
    """Draw the layer."""
    return numbers(FIXTURE)


def naive(given: Given, scale: float = 7 / 3) -> Values:
    """Token by token, gradients by the chain rule on paper."""
    W, A, B, x, g = (given[name] for name in ("W", "A", "B", "x", "g"))
    y, dx, dA, dB = torch.zeros_like(g), torch.zeros_like(x), torch.zeros_like(A), torch.zeros_like(B)
    for row in range(x.shape[0]):
        for token in range(x.shape[1]):
            inner = A @ x[row, token]
            y[row, token] = W @ x[row, token] + scale * (B @ inner)
            back = B.T @ g[row, token]
            dB += scale * torch.outer(g[row, token], inner)
            dA += scale * torch.outer(back, x[row, token])
            dx[row, token] = W.T @ g[row, token] + scale * (A.T @ back)
    return Values({"y": y}, {"A": dA, "B": dB, "x": dx})


def ours(given: Given) -> Values:
    """The layer of a model that the method was applied to."""
    _, model = attach("lora", FIXTURE)
    layer, factors = lora_layer(model, given)
    return passed(layer, given, factors)
