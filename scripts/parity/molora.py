"""MoLoRA: y = W x + (alpha / r) sum_e p_e B_e A_e x, p = softmax(R x)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from scripts.parity._core import Fixture, Given, Values, differentiate, leaf, normal
from scripts.parity._naive import softmax
from scripts.parity._product import attach, linear_layer, passed, put

EXPERTS, SCALE = 4, 6 / 3

FIXTURE = Fixture(
    seed=2309,
    source="Zadouri et al. 2023, arXiv 2309.05444, y = W x + (alpha / r) sum_e p_e B_e A_e x, p = softmax(R x)",
    shapes="W (64, 32), 4 experts of r 3, x (2, 5, 32)",
    config={"r": 3, "alpha": 6, "experts": EXPERTS, "target_modules": "all-linear"},
)


def numbers(fixture: Fixture, experts: int = EXPERTS) -> Given:
    """Draw W, the experts A (E, r, in) and B (E, out, r), the router R (E, in), x and g."""
    draw = fixture.generator()
    return {
        "W": normal(draw, 64, 32, scale=0.2),
        "A": normal(draw, experts, 3, 32),
        "B": normal(draw, experts, 64, 3),
        "R": normal(draw, experts, 32, scale=0.3),
        "x": normal(draw, 2, 5, 32),
        "g": normal(draw, 2, 5, 64),
    }


def given() -> Given:
    """Draw the layer."""
    return numbers(FIXTURE)


def mixture(given: Given, gate: Callable[[torch.Tensor], Iterable[torch.Tensor]]) -> Values:
    """Token by token and expert by expert; `gate` turns p (E,) into the weights of the experts."""
    trained = {name: leaf(given[name]) for name in ("A", "B", "R", "x")}
    A, B, R, x = trained.values()
    rows = []
    for row in x:
        for token in row:
            y = given["W"] @ token
            for expert, weight in enumerate(gate(softmax(R @ token))):
                y = y + SCALE * weight * (B[expert] @ (A[expert] @ token))
            rows.append(y)
    y = torch.stack(rows).reshape(given["g"].shape)
    return Values({"y": y}, differentiate(y, given["g"], trained))


def naive(given: Given) -> Values:
    """Every expert counts with its probability."""
    return mixture(given, lambda p: p)


def ours(given: Given) -> Values:
    """The layer; its experts lie one after another in one tensor."""
    _, model = attach("molora", FIXTURE)
    layer = linear_layer(model, "model.layers.1.mlp.gate_proj")
    found = passed(layer, given, place(layer, given))
    return Values(found.outputs, gathered(found.gradients))


def place(layer: Any, given: Given) -> dict[str, torch.Tensor]:
    """Put the fixture's numbers into a layer's experts, which lie in one tensor or in one each; return what trains."""
    inner = layer.experts["default"]
    pairs = inner.pairs()
    rows = [part.flatten(0, 1) for part in given["A"].chunk(len(pairs))]
    columns = [part.transpose(0, 1).flatten(1) for part in given["B"].chunk(len(pairs))]
    trained = {"R": inner.router}
    numbers = {"R": given["R"], "W": given["W"]}
    for i, (A, B) in enumerate(pairs):
        trained |= {f"A_{i}": A, f"B_{i}": B}
        numbers |= {f"A_{i}": rows[i], f"B_{i}": columns[i]}
    put(numbers, {**trained, "W": layer.base_layer.weight})
    return trained


def gathered(gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Turn gradients as `place` names them into (E, r, in) and (E, out, r)."""
    count = sum(name.startswith("A_") for name in gradients)
    A = torch.cat([gradients[f"A_{i}"] for i in range(count)])
    B = torch.cat([gradients[f"B_{i}"] for i in range(count)], dim=1)
    factors = {"A": A.unflatten(0, (-1, 3)), "B": B.unflatten(1, (-1, 3)).transpose(0, 1)}
    return {**{n: g for n, g in gradients.items() if n[:2] not in ("A_", "B_")}, **factors}
