"""MoV: an activation z times sum_e p_e l_e, p = softmax(R z)."""

from __future__ import annotations

import torch

from scripts.parity._core import Fixture, Given, Values, differentiate, leaf, normal
from scripts.parity._naive import softmax
from scripts.parity._product import attach, linear_layer, passed, put

EXPERTS = 4

FIXTURE = Fixture(
    seed=2309,
    source="Zadouri et al. 2023, arXiv 2309.05444, z sum_e softmax(R z)_e l_e; "
    "for-ai/parameter-efficient-moe, mov.py: the router reads the activation",
    shapes="keys and values W (16, 32), FFN W (32, 64); 4 experts; x (2, 5, 32) and (2, 5, 64)",
    config={"experts": EXPERTS},
)


def given() -> Given:
    """Draw a projection whose output is scaled (k) and one whose input is (ffn)."""
    draw = FIXTURE.generator()
    return {
        "k.W": normal(draw, 16, 32, scale=0.2),
        "k.l": 1 + normal(draw, EXPERTS, 16, scale=0.3),
        "k.R": normal(draw, EXPERTS, 16, scale=0.3),
        "k.x": normal(draw, 2, 5, 32),
        "k.g": normal(draw, 2, 5, 16),
        "ffn.W": normal(draw, 32, 64, scale=0.2),
        "ffn.l": 1 + normal(draw, EXPERTS, 64, scale=0.3),
        "ffn.R": normal(draw, EXPERTS, 64, scale=0.3),
        "ffn.x": normal(draw, 2, 5, 64),
        "ffn.g": normal(draw, 2, 5, 32),
    }


def scaled(z: torch.Tensor, vectors: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
    """One token's activation times its mixture of vectors."""
    p = softmax(router @ z)
    return z * sum(p[expert] * vectors[expert] for expert in range(EXPERTS))


def naive(given: Given) -> Values:
    """Token by token."""
    outputs: dict[str, torch.Tensor] = {}
    gradients: dict[str, torch.Tensor] = {}
    for part in ("k", "ffn"):
        trained = {name: leaf(given[f"{part}.{name}"]) for name in ("l", "R", "x")}
        vectors, router, x = trained.values()
        W, g = given[f"{part}.W"], given[f"{part}.g"]
        rows = []
        for token in x.flatten(0, 1):
            rows.append(scaled(W @ token, vectors, router) if part == "k" else W @ scaled(token, vectors, router))
        y = torch.stack(rows).reshape(g.shape)
        outputs[f"{part}.y"] = y
        gradients |= {f"{part}.{name}": found for name, found in differentiate(y, g, trained).items()}
    return Values(outputs, gradients)


def ours(given: Given) -> Values:
    """Both layers of one model."""
    _, model = attach("mov", FIXTURE)
    outputs: dict[str, torch.Tensor] = {}
    gradients: dict[str, torch.Tensor] = {}
    for part, name in (("k", "self_attn.k_proj"), ("ffn", "mlp.down_proj")):
        layer = linear_layer(model, f"model.layers.1.{name}")
        own = {mark: given[f"{part}.{mark}"] for mark in ("W", "l", "R", "x", "g")}
        trained = {"l": layer.experts["default"].vectors, "R": layer.experts["default"].router}
        put(own, {**trained, "W": layer.base_layer.weight})
        found = passed(layer, own, trained)
        outputs[f"{part}.y"] = found.outputs["y"]
        gradients |= {f"{part}.{mark}": gradient for mark, gradient in found.gradients.items()}
    return Values(outputs, gradients)
