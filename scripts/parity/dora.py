"""DoRA: W' = m V / ||V||, V = W + s B A, the norm (one per output row) a constant in backward."""

from __future__ import annotations

import torch

from scripts.parity import lora
from scripts.parity._core import Fixture, Given, Values, normal
from scripts.parity._product import attach, lora_layer, passed, put

FIXTURE = Fixture(
    seed=2402,
    source="Liu et al. 2024, arXiv 2402.09353, W' = m V / ||V||, the norm detached (section 4.3)",
    shapes="W (64, 32), m (64,), x (2, 5, 32), r 3",
    config={"r": 3, "alpha": 7, "target_modules": "all-linear"},
)


def given() -> Given:
    """LoRA's numbers and a magnitude m that is not the norm of anything."""
    return {**lora.numbers(FIXTURE), "m": 1 + normal(FIXTURE.generator(), 64, scale=0.3)}


def naive(given: Given) -> Values:
    """Row by row of V; with c = m / ||V|| held constant for A and B."""
    W, A, B, m, x, g = (given[name] for name in ("W", "A", "B", "m", "x", "g"))
    scale = 7 / 3
    V = W + scale * (B @ A)
    norm = torch.stack([sum(entry**2 for entry in row) ** 0.5 for row in V])
    y, dx, dA, dB, dm = (torch.zeros_like(t) for t in (g, x, A, B, m))
    for row in range(x.shape[0]):
        for token in range(x.shape[1]):
            here, back = x[row, token], g[row, token]
            y[row, token] = m / norm * (V @ here)
            dm += back * (V @ here) / norm
            scaled = back * m / norm
            dx[row, token] = V.T @ scaled
            dB += scale * torch.outer(scaled, A @ here)
            dA += scale * torch.outer(B.T @ scaled, here)
    return Values({"y": y}, {"A": dA, "B": dB, "m": dm, "x": dx})


def ours(given: Given) -> Values:
    """The layer with the magnitude that the fixture draws."""
    _, model = attach("dora", FIXTURE)
    layer, factors = lora_layer(model, given)
    magnitude = layer.lora_magnitude_vector["default"].weight
    put(given, {"m": magnitude})
    return passed(layer, given, {**factors, "m": magnitude})
