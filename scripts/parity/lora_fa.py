"""LoRA-FA version 2: A frozen, B's gradient corrected so that s ghat A is the full gradient on A's row space."""

from __future__ import annotations

from dataclasses import replace

import torch

from scripts.parity import lora
from scripts.parity._core import Fixture, Given, Values
from scripts.parity._product import attach, gradients_of, lora_layer

FIXTURE = Fixture(
    seed=2308,
    source="Zhang et al. 2023, arXiv 2308.03303; version 2: ghat_B = g_B (A A^T)^-1 / s^2",
    shapes="W (64, 32), x (2, 5, 32), r 3",
    config={"r": 3, "alpha": 7, "variant": "v2", "target_modules": "all-linear"},
)


def given() -> Given:
    """Draw LoRA's layer."""
    return lora.numbers(FIXTURE)


def naive(given: Given) -> Values:
    """Correct LoRA's gradient of B; A has none. The inverse by Cramer's rule on the 3 x 3 Gram matrix."""
    scale = 7 / 3
    plain = lora.naive(given)
    gram = given["A"] @ given["A"].T
    rows = [torch.linalg.cross(gram[(i + 1) % 3], gram[(i + 2) % 3]) for i in range(3)]
    inverse = torch.stack(rows, dim=1) / torch.dot(gram[0], rows[0])
    corrected = plain.gradients["B"] @ inverse / scale**2
    full = torch.einsum("bto,bti->oi", given["g"], given["x"])
    projected = full @ given["A"].T @ inverse @ given["A"]
    gradients = {"B": corrected, "B of version 1": plain.gradients["B"]}
    return Values({"y": plain.outputs["y"], "s ghat A": projected}, gradients)


def ours(given: Given) -> Values:
    """The layer of either version; A must have no gradient."""
    y, gradients = both(given, FIXTURE)
    _, plain = both(given, replace(FIXTURE, config={**FIXTURE.config, "variant": "v1"}))
    return Values(
        {"y": y, "s ghat A": 7 / 3 * gradients["B"] @ given["A"]}, {**gradients, "B of version 1": plain["B"]}
    )


def both(given: Given, fixture: Fixture) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Output and gradient of a version."""
    _, model = attach("lora_fa", fixture)
    layer, factors = lora_layer(model, given)
    if factors["A"].requires_grad:
        raise ValueError("A trains")
    y = layer(given["x"])
    y.backward(given["g"])
    return y, gradients_of({"B": factors["B"]})
