"""PeriodicLoRA, m = 0.5: half of s B A is unloaded into W, both factors shrink by sqrt(1 - m), the state is dropped."""

from __future__ import annotations

from torch import Tensor

from scripts.parity._core import Fixture, Given, Values, normal
from scripts.parity._naive import AdamW, lora_gradients
from scripts.parity._product import Steps, attach, gradients_of, lora_layer
from scripts.parity.relora import change

PERIODS, STEPS, LR, SCALE, M = 3, 2, 1e-2, 4 / 2, 0.5

FIXTURE = Fixture(
    seed=2402,
    source="Meng et al. 2024, arXiv 2402.16141, unloading; its formula of the momentum is not "
    "verified: here W += m s B A, A and B times sqrt(1 - m), which leaves the function as it was",
    shapes="W (64, 32), x (2, 5, 32), r 2, 3 periods of 2 AdamW steps",
    config={"r": 2, "alpha": 4, "period": STEPS, "unload_share": M, "target_modules": "all-linear"},
)


def given() -> Given:
    """Draw W, the first A and B, and x and g for every step."""
    draw = FIXTURE.generator()
    numbers = {"W": normal(draw, 64, 32, scale=0.2), "A": normal(draw, 2, 32), "B": normal(draw, 64, 2)}
    for step in range(PERIODS * STEPS):
        numbers[f"x{step}"] = normal(draw, 2, 5, 32)
        numbers[f"g{step}"] = normal(draw, 2, 5, 64)
    return numbers


def naive(given: Given) -> Values:
    """W really moves, period by period; after the last one nothing more is unloaded."""
    W, values, optimizer = given["W"].clone(), {"A": given["A"], "B": given["B"]}, AdamW(LR)
    outputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    for period in range(PERIODS):
        if period:
            W = W + M * SCALE * values["B"] @ values["A"]
            values = {name: (1 - M) ** 0.5 * value for name, value in values.items()}
            optimizer.forget()
        for step in range(period * STEPS, (period + 1) * STEPS):
            x, g = given[f"x{step}"], given[f"g{step}"]
            outputs[f"y{step}"] = x @ (W + SCALE * values["B"] @ values["A"]).T
            found = lora_gradients(values["A"], values["B"], SCALE, x, g)
            gradients |= {f"{name}{step}": gradient for name, gradient in found.items()}
            values = optimizer.step(values, found)
    outputs |= values
    outputs["change"] = W + SCALE * values["B"] @ values["A"] - given["W"]
    return Values(outputs, gradients)


def ours(given: Given) -> Values:
    """Steps of the trainer's kind."""
    method, model = attach("periodic_lora", FIXTURE)
    layer, factors = lora_layer(model, given)
    steps = Steps(method, model, total=PERIODS * STEPS, lr=LR)
    outputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    for step in range(PERIODS * STEPS):
        y = layer(given[f"x{step}"])
        y.backward(given[f"g{step}"])
        outputs[f"y{step}"] = y
        gradients |= gradients_of(factors, step)
        steps.step()
    outputs |= {name: factor.detach().clone() for name, factor in factors.items()}
    return Values({**outputs, "change": change(layer, given)}, gradients)
