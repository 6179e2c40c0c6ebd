"""What a run works on, and a stage of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peftctl.artifacts.rundir import RunDir
from peftctl.console import Reporter
from peftctl.data.collate import Collator
from peftctl.data.encode import EncodedRow
from peftctl.methods.base import Method
from peftctl.recipe.schema import Recipe
from peftctl.training.checkpoints import StageMark, Whole
from peftctl.training.signals import StopRequest


@dataclass(frozen=True)
class Workload:
    """What every stage trains on and writes to.

    Args:
        rebuild: Returns a new model with what was learned so far: a stage can't begin in one that an engine has divided
            among the processes. None where no such engine and a method with several stages meet.
    """

    recipe: Recipe
    method: Method
    train_rows: Sequence[EncodedRow]
    eval_rows: Sequence[EncodedRow]
    collate: Collator
    run: RunDir
    reporter: Reporter
    rebuild: Callable[[Whole], Any] | None = None


@dataclass(frozen=True, kw_only=True)
class StageRun(Workload):
    """One stage of a workload.

    Args:
        stop: Set by a signal.
        mark: Where the stage starts; `offset` optimizer steps lie behind it.
        is_main: Whether it is the last stage, in which the best weights are chosen.
    """

    stop: StopRequest
    mark: StageMark
    is_main: bool
