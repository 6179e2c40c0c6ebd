"""`peftctl eval --tasks`: benchmarks of lm-evaluation-harness, or task files of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftctl.artifacts.load import Artefact, load, locate
from peftctl.artifacts.manifest import read_json
from peftctl.artifacts.rundir import RunDir
from peftctl.backends import device as devices
from peftctl.commands.recipes import load_recipe
from peftctl.errors import UsageError
from peftctl.evaluation.harness import require_harness, run_tasks
from peftctl.recipe.schema import EvalSection

Results = dict[str, dict[str, float]]


@dataclass(frozen=True)
class TaskEvaluation:
    """What was measured.

    Args:
        target: As given.
        tasks: Task -> metric -> value.
        base: The same of its base model, on request.
        file: Where it was written, if it was.
    """

    target: str
    tasks: Results
    base: Results | None
    file: Path | None


def evaluate_tasks(
    target: str,
    tasks: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    recipe: str | None = None,
    with_base: bool = False,
) -> TaskEvaluation:
    """Measure a target on tasks; eval.batch_size and eval.rows of its recipe hold.

    Args:
        target: Run directory, adapter directory, model directory, hub id or alias.
        tasks: Names, or paths of task files.
        overrides: KEY=VALUE on the recipe, e.g. `eval.rows=100`.
        recipe: Where the `eval:` section comes from; left out, the run's own recipe, else the defaults.
        with_base: Measure the base model as well.

    Raises:
        UsageError: The harness is not installed, there is no such task, or no recipe for the overrides.
        RunError: A task's data can't be had.
    """
    require_harness()
    if not tasks:
        raise UsageError("--tasks: expected names or task files, separated by commas")
    artefact = locate(target)
    section = _section(artefact, recipe, overrides)
    if with_base and artefact.base is None:
        raise UsageError(f"{target}: is a whole model; there is no base to set beside it")
    devices.start_process()
    results = _measure(target, tasks, section)
    base = _measure(str(artefact.base), tasks, section) if with_base else None
    return TaskEvaluation(target, results, base, _write(artefact, results, base))


def _section(artefact: Artefact, recipe: str | None, overrides: Sequence[str]) -> EvalSection:
    source = recipe or artefact.recipe
    if source is None:
        if overrides:
            raise UsageError(f"{artefact.target}: holds no recipe that {overrides[0]} could change; give --recipe FILE")
        return EvalSection()
    return load_recipe(source, overrides).eval


def _measure(target: str, tasks: Sequence[str], section: EvalSection) -> Results:
    model, tokenizer = load(target, device=devices.current_device())
    return run_tasks(model, tokenizer, tasks, batch_size=section.batch_size, rows=section.rows)


def _write(artefact: Artefact, results: Results, base: Results | None) -> Path | None:
    """Put the results into eval.json, beside what was measured on held-out rows."""
    if artefact.path is None:
        return None
    run = RunDir(artefact.path)
    earlier: dict[str, Any] = read_json(run.eval) if run.eval.is_file() else {}
    known = {**earlier.get("tasks", {}), **results}
    run.write_json(run.eval, {**earlier, "tasks": known, "tasks_base": base})
    return run.eval
