"""LISA: gradients of the active blocks, embeddings and final norm are those of full fine-tuning; others have none."""

from __future__ import annotations

import torch

from peftctl.methods.base import Stage, StepInfo
from scripts.parity._core import Fixture, Given, Values, differentiate, leaf
from scripts.parity._llama import FLOAT32, HEADS, weights
from scripts.parity._naive import cross_entropy, llama
from scripts.parity._product import attach, forget_nothing, small_llama

DRAWS = 12

FIXTURE = Fixture(
    seed=2403,
    source="Pan et al. 2024, arXiv 2403.17919, embedding, head, final norm and gamma blocks train",
    shapes="Llama of 4 blocks, d 16, tied; ids (2, 6); gamma 2",
    config={"gamma": 2, "interval": 1},
    tolerance=5e-6,
    reason=FLOAT32,
)


def given() -> Given:
    """Draw every weight of the model and two rows of ids."""
    draw = FIXTURE.generator()
    ids = torch.randint(0, 40, (2, 6), generator=draw)
    return {**weights(draw, layers=4), "ids": ids}


def naive(given: Given) -> Values:
    """Full fine-tuning's gradients, of every tensor; the product's side leaves out those of frozen blocks."""
    trained = {name: leaf(tensor) for name, tensor in given.items() if name != "ids"}
    logits = llama(trained, given["ids"], HEADS)
    outputs = {"logits": logits, "active blocks": torch.full((DRAWS,), 2)}
    return Values(outputs, differentiate(cross_entropy(logits, given["ids"]), None, trained))


def ours(given: Given) -> Values:
    """Draw until every block has been active; a block that rests must have no gradient."""
    method, model = attach("lisa", FIXTURE, small_llama(given))
    method.enter(model, Stage(), lambda stage: ())
    (callback,) = method.callbacks(model)
    callback.stage_begins(StepInfo(0, DRAWS, model, forget_nothing))
    gradients: dict[str, torch.Tensor] = {}
    active = []
    for step in range(DRAWS):
        logits = model(input_ids=given["ids"]).logits
        cross_entropy(logits, given["ids"]).backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        active.append(len({name.split(".")[2] for name in found if name.startswith("model.layers.")}))
        gradients |= found
        model.zero_grad()
        callback.after_step(StepInfo(step + 1, DRAWS, model, forget_nothing))
    return Values({"logits": logits, "active blocks": torch.tensor(active)}, gradients)
