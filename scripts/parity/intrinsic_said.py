"""Intrinsic SAID: every tensor theta_0 + lambda_layer P z, P the Fastfood matrix written out."""

from __future__ import annotations

import torch

from peftctl.tuners.fastfood import layers
from peftctl.tuners.fastfood_projection import Drawn, Projection
from scripts.parity._core import Fixture, Given, Values, differentiate, leaf, normal
from scripts.parity._llama import FLOAT32, HEADS, weights
from scripts.parity._naive import cross_entropy, llama
from scripts.parity._product import attach, put, small_llama

Z, BLOCKS = 12, 2

FIXTURE = Fixture(
    seed=2012,
    source="Aghajanyan, Zettlemoyer, Gupta 2020, arXiv 2012.13255, theta_0 + lambda P z; "
    "Fastfood: Le, Sarlos, Smola 2013, arXiv 1408.3060; normalised as in rabeehk/compacter, intrinsic.py",
    shapes="Llama of 2 blocks, d 16, tied; z (12,), one lambda a block, linear layers; ids (2, 6)",
    config={"d": Z + BLOCKS},
    tolerance=5e-6,
    reason=FLOAT32,
)


def given() -> Given:
    """Draw the model and ids, B, Pi and G of every linear layer; z and the lambdas away from their start."""
    draw = FIXTURE.generator()
    numbers = weights(draw, layers=BLOCKS)
    ids = torch.randint(0, 40, (2, 6), generator=draw)
    for name, weight in list(numbers.items()):
        if "proj" in name:
            at = name.removesuffix(".weight")
            size = 1 << (weight.numel() - 1).bit_length()
            numbers[f"{at}.positions"] = torch.randperm(size, generator=draw).int()
            numbers[f"{at}.gaussian"] = torch.randn(size, generator=draw).half()
            numbers[f"{at}.signs"] = (torch.randint(0, 2, (16,), generator=draw) * 2 - 1).to(torch.int8)
    return {**numbers, "ids": ids, "z": normal(draw, Z, scale=0.5), "lambda": 1 + normal(draw, BLOCKS, scale=0.3)}


def hadamard(size: int) -> torch.Tensor:
    """Sylvester's construction: H_2n = [[H, H], [H, -H]], not normalised."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < size:
        H = torch.cat([torch.cat([H, H], dim=1), torch.cat([H, -H], dim=1)])
    return H


def matrix(entries: int, signs: torch.Tensor, positions: torch.Tensor, gaussian: torch.Tensor) -> torch.Tensor:
    """P (entries, |z|): H G Pi H B on the unit vectors, the first rows, over sqrt(LL sum G^2) sqrt(D / LL).

    Args:
        entries: D.
        signs: B, of the entries that z may have; those behind it meet zeros.
        positions: Pi moves entry k to positions[k].
        gaussian: G, of LL entries.
    """
    size = len(gaussian)
    H = hadamard(size)
    permutation = torch.zeros(size, size, dtype=torch.float64)
    for column, row in enumerate(positions.tolist()):
        permutation[row, column] = 1.0
    columns = H[:, :Z] * signs.double()[None, :Z]
    columns = H @ (gaussian.double()[:, None] * (permutation @ columns))
    return columns[:entries] / ((size * (gaussian.double() ** 2).sum()) ** 0.5 * (entries / size) ** 0.5)


def naive(given: Given) -> Values:
    """The model of theta_0 + lambda P z, every P an explicit matrix."""
    trained = {name: leaf(given[name]) for name in ("z", "lambda")}
    numbers = {name: tensor for name, tensor in given.items() if name.endswith(".weight")}
    for name, weight in list(numbers.items()):
        if "proj" in name:
            at = name.removesuffix(".weight")
            P = matrix(weight.numel(), *(given[f"{at}.{part}"] for part in ("signs", "positions", "gaussian")))
            move = trained["lambda"][int(name.split(".")[2])] * (P @ trained["z"])
            numbers[name] = weight + move.reshape(weight.shape)
    logits = llama(numbers, given["ids"], HEADS)
    return Values({"logits": logits}, differentiate(cross_entropy(logits, given["ids"]), None, trained))


def ours(given: Given) -> Values:
    """The library's model with the method's layers, whose random parts make way for the fixture's."""
    _, model = attach("intrinsic_said", FIXTURE, small_llama(given))
    for name, layer in layers(model):
        drawn = Drawn(*(given[f"{name}.{part}"] for part in ("positions", "gaussian", "signs")))
        layer.projections["default"] = Projection(drawn, layer.size, torch.device("cpu"))
    tuner = model.base_model
    trained = {"z": tuner.fastfood_z["default"], "lambda": tuner.fastfood_scale["default"]}
    put(given, trained)
    logits = model(input_ids=given["ids"]).logits
    return Values({"logits": logits}, differentiate(cross_entropy(logits, given["ids"]), None, trained))
