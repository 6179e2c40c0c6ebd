"""`peftctl eval`: measure a run, an adapter, a merged or a plain model on held-out rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftctl.artifacts.load import Artefact, load, locate
from peftctl.artifacts.rundir import RunDir
from peftctl.backends import device as devices
from peftctl.commands.recipes import load_recipe
from peftctl.data.collate import Collator
from peftctl.data.dataset import encode_all, load_examples
from peftctl.errors import UsageError
from peftctl.evaluation.evaluate import evaluate_rows
from peftctl.models.aliases import cache_root
from peftctl.models.classifier import classification_task, labels_of
from peftctl.recipe.schema import CLASSIFICATION, Recipe


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Args:
        target: As given.
        metrics: Of the target.
        base: Of its base model, on request.
        samples: Prompt, reference and prediction of generated rows.
        file: Where it was written, if it was.
    """

    target: str
    metrics: Mapping[str, float]
    base: Mapping[str, float] | None
    samples: Sequence[Mapping[str, str]]
    file: Path | None


def evaluate(
    target: str, overrides: Sequence[str] = (), *, recipe: str | None = None, with_base: bool = False
) -> Evaluation:
    """Measure a target with the metrics of a recipe's `eval:` section.

    Args:
        target: Run directory, adapter directory, model directory, hub id or alias.
        overrides: KEY=VALUE on the recipe, e.g. `data.eval=other.jsonl`.
        recipe: Where data and metrics come from; left out, the run's own recipe.
        with_base: Measure the base model as well.

    Raises:
        UsageError: No recipe is known for the target, or it names no held-out rows.
    """
    artefact = locate(target)
    settings = load_recipe(recipe or _own_recipe(artefact, target), overrides)
    examples = load_examples(settings.data, settings.train.seed).eval
    if not examples:
        raise UsageError(f"{target}: the recipe names no held-out rows; give data.eval=FILE")
    devices.start_process()
    metrics, samples = _measure(target, settings, examples)
    base = None
    if with_base:
        if artefact.base is None:
            raise UsageError(f"{target}: is a whole model; there is no base to set beside it")
        if settings.model.task in CLASSIFICATION:
            raise UsageError(f"{target}: its base has no head for these classes; there is nothing to set beside it")
        base, _ = _measure(artefact.base, settings, examples)
    file = _write(artefact, metrics, base, samples)
    return Evaluation(target, metrics, base, samples, file)


def _measure(target: str, settings: Recipe, examples: Sequence[Any]) -> tuple[Mapping[str, float], list[Any]]:
    model, tokenizer = load(target, device=devices.current_device())
    data, task = settings.data, settings.model.task
    found = classification_task(model)
    if (found or task) != task or (found is None and task in CLASSIFICATION):
        raise UsageError(f"{target}: is a {found or 'language model'}, and the recipe has model.task {task}")
    if found:  # the model's classes count, in its order
        data = data.model_copy(update={"labels": labels_of(model)})
    rows, _ = encode_all(examples, tokenizer, data, cache_root(), task)
    collate = Collator(tokenizer, data.pad_to_multiple_of)
    result = evaluate_rows(model, tokenizer, examples, rows, data, settings.eval, collate)
    return result.metrics, list(result.samples)


def _own_recipe(artefact: Artefact, target: str) -> Path:
    if artefact.recipe is None:
        raise UsageError(f"{target}: holds no recipe, so say what to measure on with --recipe FILE")
    return artefact.recipe


def _write(artefact: Artefact, metrics: Any, base: Any, samples: Sequence[Any]) -> Path | None:
    """Write eval.json into the run directory, or beside the files of a local artefact."""
    if artefact.path is None:
        return None
    run = RunDir(artefact.path)
    run.write_json(run.eval, {"metrics": metrics, "base": base, "samples": list(samples)})
    return run.eval
