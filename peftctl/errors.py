"""Every error that peftctl raises on purpose; anything else is a bug and keeps its traceback.

Exit codes: 1 the run failed, 2 the recipe, the data or the arguments are wrong.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class PeftctlError(Exception):
    """Root of all known errors: one message, no traceback."""

    exit_code = 1


class RunError(PeftctlError):
    """The run failed: full disk, NaN loss, a gate that did not hold."""


class Interrupted(RunError):
    """The run was stopped by a signal after writing a checkpoint."""


class ArtifactError(RunError):
    """An artefact can't be read, or does not hold what it must."""


class UsageError(PeftctlError):
    """Arguments, paths or combinations that can't work."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe or a data set.

    Args:
        where: `file:line:column`, `file:line` or `command line: KEY`.
        message: What was expected and what was found.
        hint: What to do about it.
    """

    where: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" + (f"; {self.hint}" if self.hint else "")


class ProblemsError(PeftctlError):
    """Several problems, collected and shown together."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class RecipeError(ProblemsError):
    """Problems of a recipe or of KEY=VALUE overrides."""


class DataError(ProblemsError):
    """Problems of a data file or of rows in it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `did you mean 'x'?` for the nearest known name, or the list of names where none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.55)
    if near:
        return f"did you mean '{near[0]}'?"
    return "known: " + ", ".join(names)
