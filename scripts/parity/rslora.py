"""rsLoRA: LoRA with the scale alpha / sqrt(r)."""

from __future__ import annotations

from scripts.parity import lora
from scripts.parity._core import Fixture, Given, Values
from scripts.parity._product import attach, lora_layer, passed

FIXTURE = Fixture(
    seed=2312,
    source="Kalajdzievski 2023, arXiv 2312.03732, gamma_r = alpha / sqrt(r)",
    shapes="W (64, 32), x (2, 5, 32), r 3",
    config={"r": 3, "alpha": 7, "target_modules": "all-linear"},
)


def given() -> Given:
    """Draw LoRA's layer."""
    return lora.numbers(FIXTURE)


def naive(given: Given) -> Values:
    """LoRA's equation with the other scale."""
    return lora.naive(given, scale=7 / 3**0.5)


def ours(given: Given) -> Values:
    """The layer of a model that the method was applied to."""
    _, model = attach("rslora", FIXTURE)
    layer, factors = lora_layer(model, given)
    return passed(layer, given, factors)
