"""What methods that train several tasks share: every source of `data.sources` is a task, in their order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peftctl.errors import UsageError
from peftctl.recipe.schema import DataSection


def refuse_other_number(tasks: int, data: DataSection) -> None:
    """Raise where there is not one source for each task.

    Raises:
        UsageError: `data.sources` has another number; a `data.train` is one.
    """
    sources = len(data.sources) if data.sources else 1
    if tasks != sources:
        where = "one for each of data.sources" if data.sources else "as data.train is one task"
        raise UsageError(f"method.tasks: expected {sources}, {where}, got {tasks}; correct it")


def names_of_sources(data: DataSection) -> Sequence[str]:
    """Return what tasks without names are called: as their files, or by number, from 0, where those are not unlike."""
    paths = [source.path for source in data.sources or ()]
    stems = [Path(path).stem for path in paths if isinstance(path, str)]
    plain = all(stem.replace("-", "").replace("_", "").isalnum() for stem in stems)
    if plain and len(set(stems)) == len(paths):
        return stems
    return [str(i) for i in range(len(paths))]
