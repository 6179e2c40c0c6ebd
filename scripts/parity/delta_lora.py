"""Delta-LoRA: W moves by lambda s times the step-to-step change of B A, without a gradient of its own."""

from __future__ import annotations

from torch import Tensor

from scripts.parity._core import Fixture, Given, Values, leaf, normal
from scripts.parity._naive import AdamW, lora_gradients
from scripts.parity._product import Steps, attach, gradients_of, lora_layer
from scripts.parity.relora import change

STEPS, START, LR, SCALE, LAMBDA = 5, 2, 1e-2, 4 / 2, 1.5

FIXTURE = Fixture(
    seed=2309,
    source="Zi et al. 2023, arXiv 2309.02411, W_(t+1) = W_t + lambda s (B_(t+1) A_(t+1) - B_t A_t) for t >= K",
    shapes="W (64, 32), x (2, 5, 32), r 2, 5 AdamW steps, K 2",
    config={"r": 2, "alpha": 4, "weight": LAMBDA, "start": START, "target_modules": "all-linear"},
)


def given() -> Given:
    """Draw W, A, B, and x and g for every step."""
    draw = FIXTURE.generator()
    numbers = {"W": normal(draw, 64, 32, scale=0.2), "A": normal(draw, 2, 32), "B": normal(draw, 64, 2)}
    for step in range(STEPS):
        numbers[f"x{step}"] = normal(draw, 2, 5, 32)
        numbers[f"g{step}"] = normal(draw, 2, 5, 64)
    return numbers


def naive(given: Given) -> Values:
    """Add the difference to W in place, step by step: A and B see s B A's gradient alone, W none."""
    W, values, optimizer = given["W"].clone(), {"A": given["A"], "B": given["B"]}, AdamW(LR)
    outputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    for step in range(STEPS):
        x, g = given[f"x{step}"], given[f"g{step}"]
        whole = W + SCALE * values["B"] @ values["A"]
        outputs[f"y{step}"] = x @ whole.T
        gradients[f"x{step}"] = g @ whole
        found = lora_gradients(values["A"], values["B"], SCALE, x, g)
        gradients |= {f"{name}{step}": gradient for name, gradient in found.items()}
        before, values = values, optimizer.step(values, found)
        if step >= START:
            W = W + LAMBDA * SCALE * (values["B"] @ values["A"] - before["B"] @ before["A"])
    outputs["W change"] = W - given["W"]
    outputs["change"] = W + SCALE * values["B"] @ values["A"] - given["W"]
    return Values(outputs, gradients)


def ours(given: Given) -> Values:
    """Steps of the trainer's kind."""
    method, model = attach("delta_lora", FIXTURE)
    layer, factors = lora_layer(model, given)
    steps = Steps(method, model, total=STEPS, lr=LR)
    outputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    for step in range(STEPS):
        x = leaf(given[f"x{step}"])
        y = layer(x)
        y.backward(given[f"g{step}"])
        outputs[f"y{step}"] = y
        gradients |= gradients_of({**factors, "x": x}, step)
        steps.step()
    outputs["change"] = change(layer, given)
    outputs["W change"] = outputs["change"] - SCALE * factors["B"] @ factors["A"]
    return Values(outputs, gradients)
