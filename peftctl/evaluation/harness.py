"""Hand a model over to lm-evaluation-harness: its benchmarks by name, or task files of one's own.

https://github.com/EleutherAI/lm-evaluation-harness (the extra `[lm-eval]`), version 0.4.13.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftctl.errors import RunError, UsageError, did_you_mean

_ENDINGS = (".yaml", ".yml")


def require_harness() -> None:
    """Raise a UsageError where lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("--tasks: lm-evaluation-harness is not installed; pip install 'peftctl[lm-eval]'")


def run_tasks(
    model: Any, tokenizer: Any, tasks: Sequence[str], *, batch_size: int, rows: int | None
) -> dict[str, dict[str, float]]:
    """Measure a model on tasks of lm-evaluation-harness.

    Args:
        model: A language model, with its adapter attached, in evaluation mode on its device.
        tokenizer: Its tokenizer.
        tasks: Names of the harness's tasks or groups, or paths of task files (YAML). Files named in `data_files` of one
            may be given relative to it.
        batch_size: Rows a batch.
        rows: Only the first so many rows of each task; None takes all.

    Returns:
        Task -> metric -> value; a metric with a filter other than `none` is called `metric,filter`.

    Raises:
        UsageError: There is no such task, or its file is wrong.
        RunError: A task's data can't be had, or the harness fails.
    """
    require_harness()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # Reading the list of its own tasks takes long, and a task file does without.
    manager = TaskManager(include_defaults=not all(task.endswith(_ENDINGS) for task in tasks))
    specs = [_spec(task, manager.all_tasks) for task in tasks]
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        found = simple_evaluate(
            model=wrapped, tasks=specs, task_manager=manager, limit=rows, log_samples=False, bootstrap_iters=0
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(f"--tasks {','.join(tasks)}: lm-evaluation-harness fails: {reason}") from error
    return {name: _figures(values) for name, values in found["results"].items()}


def _spec(task: str, known: Sequence[str]) -> str | dict[str, Any]:
    """Return what the harness takes for a task: its name, or the content of its file."""
    if not task.endswith(_ENDINGS):
        if task not in known:
            near = did_you_mean(task, known)
            raise UsageError(
                f"--tasks: lm-evaluation-harness has no task '{task}'; "
                + (near if near.startswith("did") else "`lm-eval ls tasks` lists them; a task file ends in .yaml")
            )
        return task
    file = Path(task).expanduser()
    if not file.is_file():
        raise UsageError(f"--tasks: no such file: '{task}'")
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        content = load_yaml(file)
    except Exception as error:  # the loader runs what the file names with !function
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"--tasks: {task} can't be read as a task: {reason}") from error
    if not isinstance(content, dict) or not isinstance(content.get("task"), str):
        raise UsageError(
            f"--tasks: {task}: expected a mapping with `task: NAME`; see lm-evaluation-harness's task guide"
        )
    return _with_local_files(content, file.absolute().parent)


def _with_local_files(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make the data files of a task absolute where they lie beside its file."""
    options = content.get("dataset_kwargs") or {}
    if "data_files" not in options:
        return content
    return content | {"dataset_kwargs": options | {"data_files": _absolute(options["data_files"], folder)}}


def _absolute(files: Any, folder: Path) -> Any:
    if isinstance(files, Mapping):
        return {split: _absolute(named, folder) for split, named in files.items()}
    if isinstance(files, list):
        return [_absolute(named, folder) for named in files]
    return str(folder / files) if isinstance(files, str) and (folder / files).is_file() else files


def _figures(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics among what the harness reports, without the filter that changes nothing."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and "," in name and "_stderr" not in name
    }
