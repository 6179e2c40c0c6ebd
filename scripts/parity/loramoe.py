"""LoRAMoE: a dense mixture of LoRA experts and the localised balancing loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from scripts.parity import molora
from scripts.parity._core import Fixture, Given, Values, differentiate, leaf, normal, total
from scripts.parity._naive import softmax
from scripts.parity._product import Supervised, attach, linear_layer, passed, put

DELTA, WEIGHT = 0.1, 0.7

FIXTURE = Fixture(
    seed=2312,
    source="Dou et al. 2023, arXiv 2312.09979, the loss as in Ablustrund/LoRAMoE: "
    "unbiased var(Z) / (mean(Z)^2 + 1e-10) over flattened Z, the mean over layers",
    shapes="W (64, 32), 4 experts of r 3, x (2, 5, 32), the last token of row 1 padding, types 1 and 0",
    config={
        "r": 3,
        "alpha": 6,
        "experts": molora.EXPERTS,
        "delta": DELTA,
        "balance": WEIGHT,
        "task_types": [1, 0],
    },
)


def given() -> Given:
    """Draw the layer; a mask of the tokens and the type of every sample."""
    tokens = torch.ones(2, 5, dtype=torch.long)
    tokens[1, 4] = 0
    second = normal(FIXTURE.generator(), molora.EXPERTS, 32, scale=0.5)
    return {**molora.numbers(FIXTURE), "R2": second, "tokens": tokens, "types": torch.tensor([1, 0])}


def balance(given: Given, R: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Q summed over a sample's tokens, weighted 1 + delta on the half of its type (type 1: the first half)."""
    Z = []
    for sample in range(2):
        Q = total(softmax(R @ x[sample, token]) for token in range(5) if given["tokens"][sample, token])
        for expert in range(molora.EXPERTS):
            kind = 1 if expert < molora.EXPERTS // 2 else 0
            sign = 1 if kind == given["types"][sample] else -1
            Z.append((1 + sign * DELTA) * Q[expert])
    mean = total(Z) / len(Z)
    variance = total((z - mean) ** 2 for z in Z) / (len(Z) - 1)
    return variance / (mean**2 + 1e-10)


def naive(given: Given) -> Values:
    """The mixture, and the mean of the loss over two layers with its gradient for their routers."""
    mixed = molora.naive(given)
    routers = {"R of the loss": leaf(given["R"]), "R2 of the loss": leaf(given["R2"])}
    loss = WEIGHT * total(balance(given, R, given["x"]) for R in routers.values()) / 2
    found = differentiate(loss, None, routers)
    return Values({**mixed.outputs, "loss": loss}, {**mixed.gradients, **found})


def ours(given: Given) -> Values:
    """The layer; then the method's loss of a micro-batch that two layers of the model have seen."""
    method, model = attach("loramoe", FIXTURE, sources=2)
    first, second = (linear_layer(model, f"model.layers.{i}.mlp.gate_proj") for i in (1, 2))
    mixed = passed(first, given, molora.place(first, given))
    routers = {"R of the loss": first.experts["default"].router, "R2 of the loss": second.experts["default"].router}
    put({"R": given["R2"]}, {"R": routers["R2 of the loss"]})

    def forward(batch: Mapping[str, torch.Tensor]) -> Supervised:
        return Supervised((first(given["x"]) + second(given["x"])).sum())

    labels = given["tokens"] - 1  # any id but padding's: 0 where there is a token
    batch = {"labels": labels * 100, "attention_mask": given["tokens"], "task_ids": 1 - given["types"]}
    loss = method.loss(model, batch, forward)["balance"]
    gradients = {**molora.gathered(mixed.gradients), **differentiate(loss, None, routers)}
    return Values({**mixed.outputs, "loss": loss}, gradients)
