"""LongLoRA: LoRA on q, k, v, o, embeddings and norms training, attention in shifted groups, positions divided."""

from __future__ import annotations

import torch

from scripts.parity._core import Fixture, Given, Values, differentiate, leaf, normal
from scripts.parity._llama import FLOAT32, HEADS, weights
from scripts.parity._naive import cross_entropy, llama
from scripts.parity._product import attach, put, small_llama

LENGTH, GROUP, FACTOR, RANK, SCALE = 16, 4, 2.0, 2, 4 / 2
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")

FIXTURE = Fixture(
    seed=2309,
    source="Chen et al. 2023, arXiv 2309.12307, S2-Attn (segments as in the flash path of "
    "dvlab-research/LongLoRA); positions divided: Chen et al. 2023, arXiv 2306.15595",
    shapes="Llama of 2 blocks, d 16, 4 heads over 2; ids (2, 16), group 4, factor 2",
    config={"r": RANK, "alpha": 4, "group": GROUP, "rope_factor": FACTOR},
    tolerance=5e-6,
    reason=FLOAT32,
)


def given() -> Given:
    """Draw the model, a pair for every attention projection, and two rows of ids."""
    draw = FIXTURE.generator()
    numbers = weights(draw, layers=2)
    for layer in range(2):
        for linear in LINEARS:
            name = f"model.layers.{layer}.self_attn.{linear}"
            out, width = numbers[f"{name}.weight"].shape
            numbers[f"{name}.A"] = normal(draw, RANK, width, scale=0.5)
            numbers[f"{name}.B"] = normal(draw, out, RANK, scale=0.5)
    return {**numbers, "ids": torch.randint(0, 40, (2, LENGTH), generator=draw)}


def group_of(head: int, position: int) -> int:
    """First half of the heads: [0, G), [G, 2G) ...; second half: [0, G/2), [G/2, 3G/2) ... [T - G/2, T)."""
    return position // GROUP if head < HEADS // 2 else (position + GROUP // 2) // GROUP


def allowed(head: int, asks: int, answers: int) -> bool:
    """Causal, inside of one's group."""
    return answers <= asks and group_of(head, asks) == group_of(head, answers)


def naive(given: Given) -> Values:
    """The whole model pair by pair of positions; what trains: factors, embeddings, norms."""
    trained = {
        name: leaf(tensor)
        for name, tensor in given.items()
        if name.endswith((".A", ".B")) or "norm" in name or "embed" in name
    }
    numbers = {**given, **trained}
    shifted = _logits(numbers, allowed)
    gradients = differentiate(cross_entropy(shifted, given["ids"]), None, trained)
    return Values({"training": shifted, "evaluation": _logits(numbers, None)}, gradients)


def _logits(numbers: Given, who) -> torch.Tensor:
    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        weight = numbers[f"{name}.weight"]
        if f"{name}.A" in numbers:
            weight = weight + SCALE * numbers[f"{name}.B"] @ numbers[f"{name}.A"]
        return x @ weight.T

    full = {} if who is None else {"allowed": who}
    return llama(numbers, numbers["ids"], HEADS, linear=linear, factor=FACTOR, **full)


def ours(given: Given) -> Values:
    """The library's model with the method's adapter and attention, in training and in evaluation."""
    _, model = attach("longlora", FIXTURE, small_llama(given))
    trained = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            short = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            for factor in "AB":
                short = short.replace(f"lora_{factor}.default.weight", factor)
            trained[short] = parameter
    put(given, trained)
    shifted = model(input_ids=given["ids"]).logits
    gradients = differentiate(cross_entropy(shifted, given["ids"]), None, trained)
    with torch.no_grad():
        whole = model.eval()(input_ids=given["ids"]).logits
    return Values({"training": shifted, "evaluation": whole}, gradients)
