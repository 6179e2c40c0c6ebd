"""What makes a run the same run: its recipe and its data; and what was measured before training began."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from peftctl.artifacts.rundir import RunDir
from peftctl.backends import processes
from peftctl.backends.device import current_device
from peftctl.commands.prepare import Prepared
from peftctl.commands.recipes import load_recipe
from peftctl.errors import ArtifactError, UsageError
from peftctl.recipe.schema import Recipe
from peftctl.recipe.write import diff_recipes, dump_recipe
from peftctl.training.report import MetricsFile

_PACKAGES = ("peftctl", "torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "deepspeed")

# Keys that change neither a weight nor the order of rows, so that a resumed run may change them.
HARMLESS = (
    *(f"train.{key}" for key in ("output_dir", "logging_steps", "save_steps", "save_total_limit", "report_to")),
    *("backend.name", "backend.config"),
)
# How a step's rows are cut up: free as long as a step has as many.
CUTS = ("train.batch_size", "train.gradient_accumulation")


def write_identity(run: RunDir, ready: Prepared) -> None:
    """Write recipe.yaml and environment.json."""
    sources = ready.train_report.sources
    run.write_text(run.recipe, dump_recipe(ready.recipe, unread=ready.method.unread))
    run.write_json(
        run.environment,
        {
            "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
            "platform": platform.platform(),
            "device": str(current_device()),
            "threads": torch.get_num_threads(),
            "world_size": processes.size(),
            "seed": ready.recipe.train.seed,
            "data_fingerprint": ready.data_fingerprint,
            **({"data_sources": [asdict(source) for source in sources]} if sources else {}),
        },
    )


def refuse_changes(run: RunDir, ready: Prepared) -> None:
    """Raise a UsageError that shows what differs between the stopped run and what is to go on."""
    earlier, environment = load_recipe(run.recipe), _read_json(run.environment)
    rows_before = _rows_a_step(earlier, environment.get("world_size", 1))
    rows_now = _rows_a_step(ready.recipe, processes.size())
    changed = diff_recipes(earlier, ready.recipe, ignore=HARMLESS + CUTS)
    if rows_before != rows_now:
        changed.append(
            f"rows a step (train.batch_size * train.gradient_accumulation * processes): {rows_before} -> {rows_now}"
        )
    saved = environment.get("data_fingerprint")
    if saved != ready.data_fingerprint:
        changed.append(f"training data: fingerprint {str(saved)[:12]} -> {ready.data_fingerprint[:12]}")
    if changed:
        lines = "\n  ".join(changed)
        raise UsageError(
            f"{run.path}: can't resume, this is another run:\n  {lines}\nundo the change, or start over with --fresh"
        )


def _rows_a_step(recipe: Recipe, world_size: int) -> int:
    return recipe.train.batch_size * recipe.train.gradient_accumulation * world_size


def finished_summary(run: RunDir) -> dict[str, Any] | None:
    """Return summary.json of a complete run, else None."""
    return _read_json(run.summary) if run.summary.is_file() else None


def record_before(run: RunDir, metrics: Mapping[str, float]) -> None:
    """Write the evaluation before training as the first line of metrics.jsonl."""
    MetricsFile(run.metrics).write({"step": 0, "stage": "before", **metrics})


def evaluation_before(run: RunDir) -> dict[str, float] | None:
    """Return the evaluation before training where a stopped run has made it."""
    if not run.metrics.is_file():
        return None
    for line in run.metrics.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["stage"] == "before":
            return {key: value for key, value in row.items() if key not in ("step", "stage")}
    return None


def _read_json(path: Any) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: can't be read ({error}); start over with --fresh") from error


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
