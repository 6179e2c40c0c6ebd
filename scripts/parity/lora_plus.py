"""LoRA+: the first AdamW step, B's at lambda times A's learning rate."""

from __future__ import annotations

from scripts.parity import lora
from scripts.parity._core import Fixture, Given, Values
from scripts.parity._product import Steps, attach, gradients_of, lora_layer

LR, RATIO, EPS = 1e-4, 16.0, 1e-8

FIXTURE = Fixture(
    seed=2402,
    source="Hayou, Ghosh, Yu 2024, arXiv 2402.12354, eta_B = lambda eta_A; "
    "AdamW: Loshchilov, Hutter 2017, arXiv 1711.05101, algorithm 2 at t = 1, no decay",
    shapes="W (64, 32), x (2, 5, 32), r 3",
    config={"r": 3, "alpha": 7, "target_modules": "all-linear", "ratio": RATIO},
)


def given() -> Given:
    """Draw LoRA's layer."""
    return lora.numbers(FIXTURE)


def naive(given: Given) -> Values:
    """At t = 1 both bias corrections cancel: the step is lr * g / (|g| + eps)."""
    gradients = {name: lora.naive(given).gradients[name] for name in ("A", "B")}
    rates = {"A": LR, "B": RATIO * LR}
    steps = {name: -rates[name] * g / (g.abs() + EPS) for name, g in gradients.items()}
    return Values({f"step of {name}": step for name, step in steps.items()}, gradients)


def ours(given: Given) -> Values:
    """One step of the optimizer over the method's groups."""
    method, model = attach("lora_plus", FIXTURE)
    layer, factors = lora_layer(model, given)
    steps = Steps(method, model, total=1, lr=LR)
    layer(given["x"]).backward(given["g"])
    gradients = gradients_of(factors)
    steps.step()
    return Values({f"step of {name}": factor - given[name] for name, factor in factors.items()}, gradients)
