"""MoLA: LoRA experts, the two likeliest per token, their weights re-normalised to 1."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from scripts.parity import molora
from scripts.parity._core import Fixture, Given, Values, differentiate, leaf, normal, total
from scripts.parity._naive import softmax
from scripts.parity._product import Supervised, attach, linear_layer, passed, put

WEIGHT = 0.7

FIXTURE = Fixture(
    seed=2402,
    source="Gao et al. 2024, arXiv 2402.08562, the two largest of softmax(R x), re-normalised; the loss: "
    "Fedus et al. 2021, arXiv 2101.03961, equation 4, summed over layers",
    shapes="W (64, 32), 4 experts of r 3, x (2, 5, 32)",
    config={"r": 3, "alpha": 6, "allocation": [molora.EXPERTS], "load_balance": WEIGHT, "target_modules": "all-linear"},
)


def given() -> Given:
    """Draw the layer, and the router of another."""
    return {**molora.numbers(FIXTURE), "R2": normal(FIXTURE.generator(), molora.EXPERTS, 32, scale=0.5)}


def two(p: torch.Tensor) -> list[torch.Tensor]:
    """Keep the two largest, divided by their sum; the others count nothing."""
    first, second = sorted(range(len(p)), key=lambda expert: -p[expert].item())[:2]
    total = p[first] + p[second]
    return [p[expert] / total if expert in (first, second) else torch.zeros_like(total) for expert in range(len(p))]


def balance(R: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Switch's loss of a layer: E sum_e f_e P_e, f_e the share of e in what tokens chose, P_e its mean probability."""
    tokens = [softmax(R @ token) for token in x.flatten(0, 1)]
    chosen = [0.0] * len(R)
    for p in tokens:
        for expert in sorted(range(len(p)), key=lambda e, p=p: -p[e].item())[:2]:  # type: ignore[misc]
            chosen[expert] += 1 / (2 * len(tokens))
    return total(len(R) * chosen[e] * total(p[e] for p in tokens) / len(tokens) for e in range(len(R)))


def naive(given: Given) -> Values:
    """The mixture of two, and the sum of the loss over two layers with its gradient for their routers."""
    mixed = molora.mixture(given, two)
    routers = {"R of the loss": leaf(given["R"]), "R2 of the loss": leaf(given["R2"])}
    loss = WEIGHT * total(balance(R, given["x"]) for R in routers.values())
    return Values({**mixed.outputs, "loss": loss}, {**mixed.gradients, **differentiate(loss, None, routers)})


def ours(given: Given) -> Values:
    """The layer, where every expert has tensors of its own; then the loss of what two layers of the model have seen."""
    method, model = attach("mola", FIXTURE)
    first, second = (linear_layer(model, f"model.layers.{i}.mlp.gate_proj") for i in (1, 2))
    found = passed(first, given, molora.place(first, given))
    routers = {"R of the loss": first.experts["default"].router, "R2 of the loss": second.experts["default"].router}
    put({"R": given["R2"]}, {"R": routers["R2 of the loss"]})

    def forward(batch: Mapping[str, torch.Tensor]) -> Supervised:
        return Supervised((first(given["x"]) + second(given["x"])).sum())

    ones = torch.ones(2, 5, dtype=torch.long)
    loss = method.loss(model, {"labels": ones, "attention_mask": ones}, forward)["load_balance"]
    gradients = {**molora.gathered(found.gradients), **differentiate(loss, None, routers)}
    return Values({**found.outputs, "loss": loss}, gradients)
