"""ReLoRA: three cycles of LoRA, each merged, re-initialised and trained with an empty optimizer."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import get_cosine_schedule_with_warmup

from peftctl.methods import registry
from scripts.parity._core import Fixture, Given, Values, normal
from scripts.parity._naive import AdamW, lora_gradients
from scripts.parity._product import Steps, attach, gradients_of, lora_layer, put

CYCLES, STEPS, LR, SCALE = 3, 2, 1e-2, 4 / 2

FIXTURE = Fixture(
    seed=2307,
    source="Lialin et al. 2023, arXiv 2307.05695, W = W_0 + sum_i s B_i A_i; the jagged cosine and "
    "its table by Guitaricet/relora, training_utils.py",
    shapes="W (64, 32), x (2, 5, 32), r 2, 3 cycles of 2 AdamW steps",
    config={"r": 2, "alpha": 4, "cycle": STEPS, "restart_warmup": 0, "target_modules": "all-linear"},
)
RATES = (0, 10, 20, 60, 99, 100, 110, 150, 200, 210, 300, 399)
"""Steps whose learning rate is compared: 400 in all, 20 of warm-up, a restart every 100 with 10 of its own. In between,
while it climbs, the paper's code holds the envelope of the climb's end and the product follows it: not compared."""


def given() -> Given:
    """Draw W, an A for every cycle, and x and g for every step."""
    draw = FIXTURE.generator()
    numbers = {"W": normal(draw, 64, 32, scale=0.2)}
    for cycle in range(CYCLES):
        numbers[f"A{cycle}"] = normal(draw, 2, 32)
    for step in range(CYCLES * STEPS):
        numbers[f"x{step}"] = normal(draw, 2, 5, 32)
        numbers[f"g{step}"] = normal(draw, 2, 5, 64)
    return numbers


def naive(given: Given) -> Values:
    """W really moves, cycle by cycle."""
    W, optimizer = given["W"].clone(), AdamW(LR)
    outputs: dict[str, torch.Tensor] = {}
    gradients: dict[str, torch.Tensor] = {}
    for cycle in range(CYCLES):
        optimizer.forget()
        values = {"A": given[f"A{cycle}"], "B": torch.zeros(64, 2, dtype=W.dtype)}
        for step in range(cycle * STEPS, (cycle + 1) * STEPS):
            x, g = given[f"x{step}"], given[f"g{step}"]
            outputs[f"y{step}"] = x @ (W + SCALE * values["B"] @ values["A"]).T
            found = lora_gradients(values["A"], values["B"], SCALE, x, g)
            gradients |= {f"{name}{step}": gradient for name, gradient in found.items()}
            values = optimizer.step(values, found)
        W = W + SCALE * values["B"] @ values["A"]
        singular = torch.linalg.svdvals(W - given["W"])
        outputs[f"rank{cycle}"] = (singular > 1e-9 * singular[0]).sum()
    outputs["change"] = W - given["W"]
    outputs["rates"] = torch.tensor(
        [jagged(t, total=400, first=20, every=100, again=10) for t in RATES], dtype=torch.float64
    )
    return Values(outputs, gradients)


def jagged(step: int, total: int, first: int, every: int, again: int) -> float:
    """Section 3: a cosine after the first warm-up, entered again by a short linear one after every restart."""

    def envelope(at: int) -> float:
        return at / first if at < first else 0.5 * (1 + math.cos(math.pi * (at - first) / (total - first)))

    since = step % every
    return envelope(step - since + again) * since / again if step >= every and since < again else envelope(step)


def ours(given: Given) -> Values:
    """Steps of the trainer's kind; after a restart the A that the product drew makes way for the fixture's."""
    method, model = attach("relora", FIXTURE)
    layer, factors = lora_layer(model, given)
    steps = Steps(method, model, total=CYCLES * STEPS, lr=LR)
    outputs: dict[str, torch.Tensor] = {}
    gradients: dict[str, torch.Tensor] = {}
    for step in range(CYCLES * STEPS):
        if step % STEPS == 0:
            put({"A": given[f"A{step // STEPS}"]}, {"A": factors["A"]})
        y = layer(given[f"x{step}"])
        y.backward(given[f"g{step}"])
        outputs[f"y{step}"] = y
        gradients |= gradients_of(factors, step)
        steps.step()
        if (step + 1) % STEPS == 0:
            outputs[f"rank{step // STEPS}"] = torch.linalg.matrix_rank(change(layer, given), rtol=1e-9)
    return Values({**outputs, "change": change(layer, given), "rates": rates()}, gradients)


def rates() -> torch.Tensor:
    """The library's cosine, as the trainer has it, times the method's factor."""
    kind = registry.get("relora")
    method = kind(kind.Config(name="relora", cycle=100, restart_warmup=10))  # type: ignore[call-arg]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    (shape,) = get_cosine_schedule_with_warmup(optimizer, 20, 400).lr_lambdas
    return torch.tensor([shape(t) * method.learning_rate_factor(t, 400) for t in RATES], dtype=torch.float64)


def change(layer: Any, given: Given) -> torch.Tensor:
    """What the layer has added to W: (64, 32), read off its outputs on the unit vectors."""
    with torch.no_grad():
        return layer(torch.eye(32, dtype=torch.float64)).T - given["W"]
