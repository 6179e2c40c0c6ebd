"""What a recipe takes from earlier runs: merged adapters, where training starts, what a method builds on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftctl.artifacts.belonging import (
    adapter_digest,
    finished_adapter,
    refuse_other_base,
    refuse_unmergeable,
)
from peftctl.artifacts.load import tokenizer_of
from peftctl.artifacts.locate import Artefact
from peftctl.artifacts.start import KEY as INIT_FROM
from peftctl.artifacts.start import refuse_other_shape, start_of
from peftctl.errors import UsageError
from peftctl.methods.base import Method
from peftctl.models.load import load_tokenizer
from peftctl.recipe.schema import Recipe

ADAPTERS = "model.adapters"


def earlier_adapters(recipe: Recipe) -> list[Artefact]:
    """Return the adapters that are merged into the recipe's base first; without loading weights.

    Raises:
        UsageError: One is not finished, can't be merged, is of another base or task, or lies where this run writes.
    """
    found: list[Artefact] = []
    digests: list[str] = []
    for target in recipe.model.adapters:
        artefact = finished_adapter(target, ADAPTERS)
        refuse_unmergeable(artefact, ADAPTERS)
        _refuse_place_and_task(artefact, recipe, ADAPTERS)
        refuse_other_base(artefact, recipe.model, digests, ADAPTERS, beside=True)
        found.append(artefact)
        digests.append(adapter_digest(artefact))
    _refuse_lost_tokens(found)
    return found


def refuse_unfit_start(recipe: Recipe, model: Any) -> None:
    """Raise where `method.init_from` names no finished adapter of the kind, shape and base of this recipe.

    Args:
        recipe: The recipe.
        model: What its method makes of the base, on the meta device.

    Raises:
        UsageError: What differs.
    """
    start = start_of(recipe)
    if start is None:
        return
    _refuse_place_and_task(start, recipe, INIT_FROM)
    refuse_other_shape(start, recipe, model)
    earlier = [adapter_digest(artefact) for artefact in earlier_adapters(recipe)]
    refuse_other_base(start, recipe.model, earlier, INIT_FROM)


def refuse_unfit_inputs(recipe: Recipe, method: Method) -> None:
    """Raise where a run that the method builds on is not finished, or is of another base or task.

    Raises:
        UsageError: What differs.
    """
    earlier = [adapter_digest(artefact) for artefact in earlier_adapters(recipe)]
    for key, targets in method.inputs().items():
        for target in targets:
            artefact = finished_adapter(target, key)
            _refuse_place_and_task(artefact, recipe, key)
            refuse_other_base(artefact, recipe.model, earlier, key)


def base_tokenizer(recipe: Recipe, *, allow_stand_in: bool = False) -> Any:
    """Return the tokenizer of a run's base: that of the last adapter that is merged into it, else the model's own.

    Args:
        recipe: The recipe.
        allow_stand_in: Take another model's where only the shapes of this one are known.
    """
    adapters = recipe.model.adapters
    if adapters:
        return tokenizer_of(finished_adapter(adapters[-1], ADAPTERS))
    return load_tokenizer(recipe.model, allow_stand_in=allow_stand_in)


def _refuse_lost_tokens(adapters: Sequence[Artefact]) -> None:
    """Raise where the last adapter, whose tokenizer the run takes, does not know tokens that an earlier one added."""
    if not any(artefact.manifest.get("config_changes") for artefact in adapters):
        return
    kept = tokenizer_of(adapters[-1]).get_vocab().items()
    for artefact in adapters[:-1]:
        if tokenizer_of(artefact).get_vocab().items() - kept:
            raise UsageError(
                f"{ADAPTERS}: {artefact.target} added tokens that {adapters[-1].target} does not know; list it "
                "last, or merge one that was trained on top of it"
            )


def _refuse_place_and_task(artefact: Artefact, recipe: Recipe, key: str) -> None:
    task = artefact.manifest.get("task", recipe.model.task)
    if task != recipe.model.task:
        raise UsageError(f"{key}: {artefact.target} was trained for {task}, this recipe has {recipe.model.task}")
    place = Path(recipe.train.output_dir).expanduser().resolve()
    if artefact.folder is not None and artefact.folder.resolve().is_relative_to(place):
        raise UsageError(f"{key}: {artefact.target} lies in train.output_dir; write this run to another directory")
