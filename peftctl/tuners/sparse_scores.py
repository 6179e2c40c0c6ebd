"""Scores of the entries of new sparse adapters: what each is worth before anything is trained.

Every function returns the name of a layer -> the scores of the adapter behind it, (2, dm) float32 and not negative: of
D in the first row, of U in the second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from peftctl.errors import RunError
from peftctl.models.supervised import supervised_forward
from peftctl.tuners.sparse_adapters import SparsePerceptron, sparse_adapters

Batches = Iterable[Mapping[str, torch.Tensor]]


def scores(kind: str, model: Any, batches: Batches, seed: int) -> dict[str, torch.Tensor]:
    """Return the scores of a kind.

    Args:
        kind: snip, magnitude, random or synflow.
        model: With sparse adapters whose entries are not chosen yet.
        batches: One row each, on the CPU; read by snip only.
        seed: Read by random only.

    Raises:
        RunError: There is no row to score with.
    """
    adapters = dict(sparse_adapters(model))
    if kind == "snip":
        found = snip(model, adapters, batches)
    elif kind == "magnitude":
        found = {name: module.drawn().abs() for name, module in adapters.items()}
    elif kind == "random":
        generator = torch.Generator().manual_seed(seed)
        found = {name: torch.rand(module.size, generator=generator) for name, module in adapters.items()}
    else:
        found = {name: flow(module) for name, module in adapters.items()}
    return {name: score.float().view(2, -1) for name, score in found.items()}


def snip(model: Any, adapters: Mapping[str, SparsePerceptron], batches: Batches) -> dict[str, torch.Tensor]:
    """Return |g ⊙ θ|, (2dm,), with g summed over the rows before its absolute value is taken; without dropout."""
    training, rows = model.training, 0
    held = {name: (module.indices, module.values) for name, module in adapters.items()}
    for module in adapters.values():
        drawn = module.drawn()
        module.indices = torch.arange(module.size, device=drawn.device)
        module.values = torch.nn.Parameter(drawn.clone())
    everything = [module.values for module in adapters.values()]
    sums = [torch.zeros_like(values) for values in everything]
    model.eval()
    try:
        for batch in batches:
            on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
            loss = supervised_forward(model, on_device).cross_entropy()
            torch._foreach_add_(sums, list(torch.autograd.grad(loss, everything)))
            rows += 1
    finally:
        model.train(training)
        for name, module in adapters.items():
            module.indices, module.values = held[name]
    if not rows:
        raise RunError("sparse_adapter: there is no training row to score the entries on")
    return {name: (total * adapters[name].drawn()).abs() for name, total in zip(adapters, sums, strict=True)}


def flow(module: SparsePerceptron) -> torch.Tensor:
    """Return |θ ⊙ ∂R/∂θ|, (2dm,), of an adapter, R the sum of its answer to ones with |θ| in the place of θ."""
    entries = module.drawn().abs().requires_grad_()
    ones = entries.new_ones(1, len(module.up_bias))
    (gradient,) = torch.autograd.grad(module.change(ones, entries).sum(), entries)
    return (gradient * entries.detach()).abs()
