"""Chain of LoRA: three links of falling rank, each tied into W, each with a new optimizer."""

from __future__ import annotations

import torch

from scripts.parity._core import Fixture, Given, Values, normal
from scripts.parity._naive import AdamW, lora_gradients
from scripts.parity._product import Steps, attach, gradients_of, lora_layer, put
from scripts.parity.relora import change

RANKS, STEPS, LR, SCALE = (4, 2, 1), 2, 1e-2, 6 / 4

FIXTURE = Fixture(
    seed=2401,
    source="Xia, Qin, Hazan 2024, arXiv 2401.04151, W_j = W_(j-1) + s B_j A_j, one s = alpha / r_1",
    shapes="W (64, 32), x (2, 5, 32), ranks 4, 2, 1, 2 AdamW steps a link",
    config={"r": RANKS[0], "alpha": 6, "links": len(RANKS), "ranks": list(RANKS), "target_modules": "all-linear"},
)


def given() -> Given:
    """Draw W, an A for every link, and x and g for every step."""
    draw = FIXTURE.generator()
    numbers = {"W": normal(draw, 64, 32, scale=0.2)}
    for link, rank in enumerate(RANKS):
        numbers[f"A{link}"] = normal(draw, rank, 32)
    for step in range(len(RANKS) * STEPS):
        numbers[f"x{step}"] = normal(draw, 2, 5, 32)
        numbers[f"g{step}"] = normal(draw, 2, 5, 64)
    return numbers


def naive(given: Given) -> Values:
    """Tune, tie the knot, extend."""
    W = given["W"].clone()
    outputs: dict[str, torch.Tensor] = {}
    gradients: dict[str, torch.Tensor] = {}
    for link, rank in enumerate(RANKS):
        optimizer = AdamW(LR)
        values = {"A": given[f"A{link}"], "B": torch.zeros(64, rank, dtype=W.dtype)}
        for step in range(link * STEPS, (link + 1) * STEPS):
            x, g = given[f"x{step}"], given[f"g{step}"]
            outputs[f"y{step}"] = x @ (W + SCALE * values["B"] @ values["A"]).T
            found = lora_gradients(values["A"], values["B"], SCALE, x, g)
            gradients |= {f"{name}{step}": gradient for name, gradient in found.items()}
            values = optimizer.step(values, found)
        W = W + SCALE * values["B"] @ values["A"]
        outputs[f"W{link}"] = W
    singular = torch.linalg.svdvals(W - given["W"])
    outputs["rank"] = (singular > 1e-9 * singular[0]).sum()
    return Values(outputs, gradients)


def ours(given: Given) -> Values:
    """Steps of the trainer's kind; after a restart the A that the product drew makes way for the fixture's."""
    method, model = attach("chain_of_lora", FIXTURE)
    layer, factors = lora_layer(model, given)
    steps = Steps(method, model, total=len(RANKS) * STEPS, lr=LR)
    outputs: dict[str, torch.Tensor] = {}
    gradients: dict[str, torch.Tensor] = {}
    for step in range(len(RANKS) * STEPS):
        link, rank = step // STEPS, RANKS[step // STEPS]
        if step % STEPS == 0:
            put({"A": given[f"A{link}"]}, {"A": factors["A"][:rank]})
        y = layer(given[f"x{step}"])
        y.backward(given[f"g{step}"])
        outputs[f"y{step}"] = y
        found = gradients_of(factors)
        gradients |= {f"A{step}": found["A"][:rank], f"B{step}": found["B"][:, :rank]}
        steps.step()
        if (step + 1) % STEPS == 0:
            outputs[f"W{link}"] = given["W"] + change(layer, given)
    outputs["rank"] = torch.linalg.matrix_rank(change(layer, given), rtol=1e-9)
    return Values(outputs, gradients)
