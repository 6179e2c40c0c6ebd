"""The base model that a run trains on: earlier adapters merged in, loaded, before the method is attached."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from peftctl.artifacts import manifest as manifests
from peftctl.artifacts.belonging import adapter_digest, label
from peftctl.artifacts.merge_order import merge_in_order
from peftctl.artifacts.rundir import RunDir
from peftctl.commands.earlier import earlier_adapters
from peftctl.commands.prepare import Prepared, head_of
from peftctl.console import Reporter
from peftctl.errors import UsageError
from peftctl.models.load import load_model

GATE_ROWS = 16
"""Held-out rows that the merged base is compared on."""


def on_merged_base(ready: Prepared, run: RunDir, reporter: Reporter) -> Prepared:
    """Merge the adapters of `model.adapters` into <run>/base/, and return the recipe on that base.

    A base that an earlier start has made from the same adapters is used again.

    Args:
        ready: The prepared recipe.
        run: Its run directory.
        reporter: Is told what is merged.

    Raises:
        UsageError: An adapter changed since the base was made.
        ArtifactError: The merged base does not answer like the base with its adapters.
    """
    if not ready.recipe.model.adapters:
        return ready
    adapters = earlier_adapters(ready.recipe)
    if (run.base / manifests.NAME).is_file():
        recorded = manifests.read(run.base).get("adapters", [])
        for entry, adapter in zip(recorded, adapters, strict=False):
            if entry["sha256"] != adapter_digest(adapter):
                raise UsageError(
                    f"model.adapters: {adapter.target} changed since it was merged into {run.base}; "
                    "start over with --fresh"
                )
    else:
        names = ", ".join(label(adapter) for adapter in adapters)
        reporter.notice(f"merging {names} into {ready.recipe.model.name_or_path} ...")
        rows = [row.input_ids for row in (ready.eval_rows or ready.train_rows)[:GATE_ROWS]]
        merge_in_order(adapters, run.base, base=ready.recipe.model, rows=rows)
    place = {"name_or_path": str(run.base.resolve()), "revision": None}
    recipe = ready.recipe.model_copy(update={"model": ready.recipe.model.model_copy(update=place)})
    return replace(ready, recipe=recipe)


def load_base(ready: Prepared, device: torch.device) -> Any:
    """Return the base model of a run on its device, in evaluation mode.

    Args:
        ready: The prepared recipe.
        device: Where to put it.
    """
    options, model = ready.method.load_options(), ready.recipe.model
    return load_model(
        model,
        dtype=options.dtype or model.dtype,
        device=device,
        attn_implementation=options.attn_implementation,
        quantization=ready.recipe.quantization,
        head=head_of(ready.recipe, ready.tokenizer),
    )
