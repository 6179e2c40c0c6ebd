"""What the tests of methods share."""

import torch

from peftctl.methods.base import Context
from peftctl.recipe.schema import DataSection, ModelSection, Recipe, TrainSection


def recipe(method=None, **train) -> Recipe:
    """Return a recipe for tests that apply a method by hand."""
    return Recipe(
        model=ModelSection(name_or_path="tiny", dtype="float32"),
        method=method,
        data=DataSection(train="rows.jsonl"),
        train=TrainSection(output_dir="run", **train),
    )


def context() -> Context:
    return Context(recipe())


def applied(method, model, seed=0):
    """Apply a method with a fixed seed."""
    torch.manual_seed(seed)
    return method.apply(model, context())


def run_steps(model, steps, *, lr=1e-2, weight_decay=0.0):
    """Train a few AdamW steps on one fixed batch; return the losses."""
    model.train()
    ids = torch.arange(1, 25).reshape(2, 12)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
