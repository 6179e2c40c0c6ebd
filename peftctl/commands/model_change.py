"""`peftctl model A --against B`: how far each weight moved from B to A, in magnitude and in direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from peftctl.artifacts.compare import Change, Comparison, compare, correlation
from peftctl.artifacts.locate import fetched, locate
from peftctl.artifacts.rundir import RunDir
from peftctl.artifacts.sides import Side, checkpoint_side, side_of
from peftctl.commands.model_recipe import trained_shapes
from peftctl.commands.model_report import Report, Table, by
from peftctl.commands.prepare import with_concrete_dtype
from peftctl.commands.recipes import load_recipe
from peftctl.console import figure
from peftctl.errors import ArtifactError
from peftctl.training.checkpoints import TENSORS

_NOTES = (
    "dM: mean |change of a row's length|; dD: mean (1 - cosine of a row's old and new direction); a row is an output "
    "feature, or a token of an embedding (DoRA, arXiv 2402.09353, section 3.2)",
    "correlation of dM and dD over layers: positive as LoRA's in that paper, negative as full fine-tuning's",
)


def change(target: str, against: str) -> Report:
    """Compare two models, runs, adapters or checkpoints of one shape.

    Args:
        target: W, what training led to.
        against: W0, what it set out from.

    Raises:
        UsageError: One is nothing that can be compared, or they differ in shapes.
        ArtifactError: Files are damaged, or an adapter is of another base.
    """
    comparison = compare(_side(target), _side(against))
    kinds = comparison.kinds()
    content = {
        "target": target,
        "against": against,
        "same_matrices": comparison.same,
        "changed_vectors": comparison.vectors,
        "changes": [asdict(change) for change in comparison.changes],
        "kinds": {kind: _summary(changes) for kind, changes in kinds.items()},
        "correlation": correlation(comparison.changes),
    }
    notes = [_counts(comparison), *(_NOTES if comparison.changes else ())]
    if not comparison.changes:
        return Report(content, [], notes)
    return Report(content, [_layers(f"{against} -> {target}", comparison.changes), _kinds(content)], notes)


def _side(target: str) -> Side:
    """Return the weights of a target; besides what `locate` knows, of a checkpoint."""
    folder = Path(target).expanduser()
    if not (folder / TENSORS).is_file():
        return side_of(fetched(locate(target)))
    run = RunDir(folder.absolute().parent.parent)
    recipe = with_concrete_dtype(load_recipe(run.recipe))
    if recipe.model.adapters:  # they were merged into a base of the run's own
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name_or_path": str(run.base)})})
    try:
        tensors = load_file(folder / TENSORS)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{folder / TENSORS}: is damaged or cut off ({error}); take another one") from error
    model, _ = trained_shapes(recipe)
    return checkpoint_side(target, recipe.model, model, tensors)


def _layers(title: str, changes: Sequence[Change]) -> Table:
    rows = [
        [c.name.removesuffix(".weight"), by(c.shape), *map(_cell, (c.magnitude, c.direction, c.length, c.relative))]
        for c in changes
    ]
    return title, ["layer", "shape", "dM", "dD", "mean length", "|W - W0| / |W0|"], rows


def _kinds(content: dict[str, Any]) -> Table:
    summaries = content["kinds"]
    if len(summaries) > 1:
        summaries = summaries | {"all": _mean_of(content["changes"], content["correlation"])}
    rows = [
        [kind, str(s["layers"]), *map(_cell, (s["magnitude"], s["direction"], s["correlation"]))]
        for kind, s in summaries.items()
    ]
    return "by kind of layer", ["kind", "layers", "mean dM", "mean dD", "correlation"], rows


def _summary(changes: Sequence[Change]) -> dict[str, Any]:
    return _mean_of([asdict(change) for change in changes], correlation(changes))


def _mean_of(changes: Sequence[dict[str, Any]], correlated: float | None) -> dict[str, Any]:
    means = {key: sum(c[key] for c in changes) / len(changes) for key in ("magnitude", "direction")}
    return {"layers": len(changes), **means, "correlation": correlated}


def _counts(comparison: Comparison) -> str:
    changed = len(comparison.changes)
    if not changed and not comparison.vectors:
        return f"no weight differs ({comparison.same} matrices compared)"
    return f"{changed} matrices differ, {comparison.same} are equal; {comparison.vectors} norms and biases differ"


def _cell(value: float | None) -> str:
    return "" if value is None else figure(value)
