"""VeRA: y = W x + diag(b) B diag(d) A x, A and B frozen and shared, sliced to the layer."""

from __future__ import annotations

import torch

from scripts.parity._core import Fixture, Given, Values, normal
from scripts.parity._product import attach, passed, put

FIXTURE = Fixture(
    seed=2310,
    source="Kopiczko, Blankevoort, Asano 2023, arXiv 2310.11454, h = W x + Lambda_b B Lambda_d A x",
    shapes="W (64, 32), shared A (3, 64) and B (64, 3), x (2, 5, 32)",
    config={"r": 3, "target_modules": "all-linear"},
)


def given() -> Given:
    """Draw W, the shared pair at its full size, the vectors b and d, x and g."""
    draw = FIXTURE.generator()
    return {
        "W": normal(draw, 64, 32, scale=0.2),
        "A": normal(draw, 3, 64),
        "B": normal(draw, 64, 3),
        "b": normal(draw, 64),
        "d": normal(draw, 3),
        "x": normal(draw, 2, 5, 32),
        "g": normal(draw, 2, 5, 64),
    }


def naive(given: Given) -> Values:
    """Entry by entry of the rank, gradients by the chain rule on paper."""
    W, b, d, x, g = (given[name] for name in ("W", "b", "d", "x", "g"))
    A, B = given["A"][:, :32], given["B"][:64]
    y, dx, db, dd = (torch.zeros_like(t) for t in (g, x, b, d))
    for row in range(x.shape[0]):
        for token in range(x.shape[1]):
            here, back = x[row, token], g[row, token]
            y[row, token] = W @ here
            dx[row, token] = W.T @ back
            for k in range(3):
                inner = torch.dot(A[k], here)
                y[row, token] += b * B[:, k] * d[k] * inner
                db += back * B[:, k] * d[k] * inner
                weight = torch.dot(back * b, B[:, k])
                dd[k] += weight * inner
                dx[row, token] += weight * d[k] * A[k]
    return Values({"y": y}, {"b": db, "d": dd, "x": dx})


def ours(given: Given) -> Values:
    """The layer, with the fixture's numbers in the pair that all layers share."""
    _, model = attach("vera", FIXTURE)
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.gate_proj")
    vectors = {"b": layer.vera_lambda_b["default"], "d": layer.vera_lambda_d["default"]}
    shared = {"A": model.base_model.vera_A["default"], "B": model.base_model.vera_B["default"]}
    put(given, {"W": layer.get_base_layer().weight, **shared, **vectors})
    return passed(layer, given, vectors)
