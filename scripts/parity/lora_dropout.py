"""LoRA-Dropout with given masks: input features of A and output features of B dropped, the same for every token."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import torch

from scripts.parity import lora
from scripts.parity._core import Fixture, Given, Values, normal
from scripts.parity._product import attach, linear_layer, lora_layer, passed, put

P, SCALE, OVER = 0.4, 7 / 3, 7 / (3 + 1e-5)
OVER_ADALORA = {"over": "adalora", "alpha": 7, "p": P, "target_modules": "all-linear"} | {
    "adalora": {"init_r": 3, "target_r": 2}
}

FIXTURE = Fixture(
    seed=2404,
    source="Lin et al. 2024, arXiv 2404.09610, masks of the input and output features, "
    "divided by 1 - p so that the mean is s B A",
    shapes="W (64, 32), x (2, 5, 32), r 3, masks (32,) and (64,); the same over AdaLoRA",
    config={"r": 3, "alpha": 7, "p": P, "target_modules": "all-linear"},
)


def given() -> Given:
    """LoRA's layer, two masks of zeros and ones, and AdaLoRA's lambda."""
    draw = FIXTURE.generator()
    masks = {
        "in": (torch.rand(32, generator=draw, dtype=torch.float64) >= P).double(),
        "out": (torch.rand(64, generator=draw, dtype=torch.float64) >= P).double(),
    }
    return {**lora.numbers(FIXTURE), **masks, "l": normal(draw, 3)}


def naive(given: Given) -> Values:
    """Drop columns of A and rows of B themselves; a dropped entry gets no gradient. AdaLoRA: P for B, Q for A."""
    x, g, middle = given["x"], given["g"], torch.diag(given["l"])
    columns, rows = given["in"] / (1 - P), given["out"] / (1 - P)
    A, B = given["A"] * columns[None, :], given["B"] * rows[:, None]
    whole = given["W"] + SCALE * B @ A
    full = torch.einsum("bto,bti->oi", g, x)
    gradients = {
        "A": SCALE * (B.T @ full) * columns[None, :],
        "B": SCALE * (full @ A.T) * rows[:, None],
        "x": g @ whole,
        "Q": OVER * (middle @ B.T @ full) * columns[None, :],
        "P": OVER * (full @ A.T @ middle) * rows[:, None],
        "l": OVER * torch.stack([B[:, i] @ full @ A[i] for i in range(3)]),
    }
    return Values({"y": x @ whole.T, "y over AdaLoRA": x @ (given["W"] + OVER * B @ middle @ A).T}, gradients)


def ours(given: Given) -> Values:
    """Both layers, with the library's dropout of a vector of ones made to drop what the fixture drops."""

    def drawn(ones: torch.Tensor, p: float) -> torch.Tensor:
        mask = given["in" if ones.numel() == 32 else "out"]
        return ones * mask.reshape(ones.shape) / (1 - p)

    _, model = attach("lora_dropout", FIXTURE)
    layer, factors = lora_layer(model, given)
    _, over = attach("lora_dropout", replace(FIXTURE, config=OVER_ADALORA))
    svd = linear_layer(over, "model.layers.1.mlp.gate_proj")
    triplets = {"P": svd.lora_B["default"], "l": svd.lora_E["default"], "Q": svd.lora_A["default"]}
    numbers = {"P": given["B"], "l": given["l"][:, None], "Q": given["A"], "W": given["W"]}
    put(numbers, {**triplets, "W": svd.get_base_layer().weight})
    with patch("torch.nn.functional.dropout", drawn):
        plain, found = passed(layer, given, factors), passed(svd, given, triplets)
    gradients = {**found.gradients, "l": found.gradients["l"].flatten(), **plain.gradients}
    return Values({**plain.outputs, "y over AdaLoRA": found.outputs["y"]}, gradients)
