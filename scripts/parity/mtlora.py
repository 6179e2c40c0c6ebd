"""MTLoRA: one shared LoRA and one per task, in a batch whose rows belong to different tasks."""

from __future__ import annotations

import torch

from scripts.parity._core import Fixture, Given, Values, normal
from scripts.parity._product import attach, lora_layer, passed, put

SCALE = 4.0

FIXTURE = Fixture(
    seed=2403,
    source="Agiza, Neseem, Reda 2024, arXiv 2403.20320, mode matrixv2 of scale-lab/MTLoRA, lora.py: "
    "y_t = W x + s B A x + s_t B_t A_t x, one constant s for both",
    shapes="W (64, 32), shared r 3, 2 tasks of r 2, x (3, 5, 32), tasks 0, 1, 0",
    config={"tasks": ["a", "b"], "r": 3, "task_r": 2, "scale": SCALE, "target_modules": "all-linear"},
)


def given() -> Given:
    """Draw W, the shared pair, one pair a task, x and g, and every row's task."""
    draw = FIXTURE.generator()
    numbers = {"W": normal(draw, 64, 32, scale=0.2), "A": normal(draw, 3, 32), "B": normal(draw, 64, 3)}
    for task in range(2):
        numbers[f"A{task}"], numbers[f"B{task}"] = normal(draw, 2, 32), normal(draw, 64, 2)
    numbers["x"], numbers["g"] = normal(draw, 3, 5, 32), normal(draw, 3, 5, 64)
    numbers["tasks"] = torch.tensor([0, 1, 0])
    return numbers


def naive(given: Given) -> Values:
    """Row by row: the shared pair sees every row, a task's pair its own rows."""
    x, g = given["x"], given["g"]
    gradients = {n: torch.zeros_like(given[n]) for n in ("A", "B", "A0", "B0", "A1", "B1", "x")}
    y = torch.zeros_like(g)
    for row, task in enumerate(given["tasks"].tolist()):
        for token in range(x.shape[1]):
            here, back = x[row, token], g[row, token]
            y[row, token] = given["W"] @ here
            gradients["x"][row, token] = given["W"].T @ back
            for mark in ("", str(task)):
                A, B = given[f"A{mark}"], given[f"B{mark}"]
                y[row, token] += SCALE * (B @ (A @ here))
                gradients[f"B{mark}"] += SCALE * torch.outer(back, A @ here)
                gradients[f"A{mark}"] += SCALE * torch.outer(B.T @ back, here)
                gradients["x"][row, token] += SCALE * (A.T @ (B.T @ back))
    return Values({"y": y}, gradients)


def ours(given: Given) -> Values:
    """A branch point of a model, told the tasks of the rows."""
    _, model = attach("mtlora", FIXTURE, sources=2)
    layer, factors = lora_layer(model, given)
    own = layer.task_factors
    trained = factors | {f"{name}{task}": own.get_parameter(f"{name}_{task}") for task in (0, 1) for name in "AB"}
    put(given, trained)
    own.routing.set(given["tasks"])
    return passed(layer, given, trained)
