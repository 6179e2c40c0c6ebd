"""Runs a method's stages in order; a resumed run goes on in the stage and at the step where it was.

Between stages the optimizer, the schedule and their state are dropped and built anew, because a stage may change
which tensors train.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from peftctl.artifacts.rundir import RunDir
from peftctl.backends import processes
from peftctl.data.encode import EncodedRow
from peftctl.errors import Interrupted, RunError
from peftctl.methods.base import Stage
from peftctl.recipe.schema import Recipe
from peftctl.training.arguments import library_arguments
from peftctl.training.checkpoints import StageMark, Whole, read_mark
from peftctl.training.engine import DividingEngine
from peftctl.training.precision import autocast_type
from peftctl.training.signals import stop_on_signal
from peftctl.training.trainer import MethodTrainer
from peftctl.training.workload import StageRun, Workload

_APART = 1e-3
"""Relative difference of the sum of a tensor's absolute values that no rounding explains."""


@dataclass(frozen=True)
class Selected:
    """Which weights a run ended with.

    Args:
        best_step: Optimizer steps at the lowest held-out loss; None where no loss was finite.
        best_eval_loss: That loss.
        step_of_weights: Optimizer steps of the weights that the artefact has.
        stopped_early: Whether `early_stopping` ended the run.
    """

    best_step: int | None
    best_eval_loss: float | None
    step_of_weights: int | None
    stopped_early: bool


@dataclass(frozen=True)
class Trained:
    """Totals over all stages and all processes of the run.

    Args:
        steps: Optimizer steps.
        train_tokens: Tokens, padding excluded.
        supervised_tokens: Tokens that were trained on.
        seconds: Training time, evaluation excluded.
        loss: Mean loss of the last log step.
        selected: What `load_best` and `early_stopping` came to; None where the recipe has neither.
        whole: Where the model lies divided among the processes, what it has learned.
    """

    steps: int
    train_tokens: int
    supervised_tokens: int
    seconds: float
    loss: float
    selected: Selected | None = None
    whole: Whole | None = None


def run_stages(work: Workload, model: Any, checkpoint: Path | None) -> Trained:
    """Train all stages from the beginning, or from a checkpoint.

    Raises:
        Interrupted: A signal asked to stop; a checkpoint was written.
        RunError: The loss diverged, or the disk is full.
    """
    stages = work.method.stages(work.recipe)
    lengths = stage_steps(stages, work.recipe, work.train_rows, processes.size())
    mark = read_mark(checkpoint) if checkpoint else StageMark(0, stages[0].name, 0)
    trainer = None
    with stop_on_signal() as stop:
        for index in range(mark.index, len(stages)):
            stage = stages[index]
            resumed = checkpoint if index == mark.index else None
            if trainer is not None and trainer.engine.divides_weights:
                model = _whole_again(work, trainer)
            if resumed is None:
                work.method.enter(model, stage, partial(_batches, work))
            here = mark if index == mark.index else _next_mark(trainer, index, stage)
            is_main = index == len(stages) - 1
            chosen = {**vars(work), "train_rows": stage.choose(work.train_rows)}
            stage_run = StageRun(**chosen, stop=stop, mark=here, is_main=is_main)
            args = library_arguments(
                work.recipe,
                work.run,
                autocast=autocast_type(work.recipe, work.method),
                max_steps=lengths[index],
                use_cpu=not torch.cuda.is_available(),
                select=is_main and (work.recipe.train.load_best or work.recipe.train.early_stopping is not None),
                leaves_out=work.method.leaves_out,
            )
            trainer = MethodTrainer(stage_run, model, args)
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
            if trainer.stopped_by_signal:
                name = stop.signal.name if stop.signal else "a signal to another process"
                raise _interrupted(work.run, trainer.total_step, name)
    if trainer is None:
        raise RunError("the method has no stage left to train")
    refuse_divergence(trainer)
    totals = _totals(trainer, _select(trainer))
    trainer.engine.leave()
    return totals


def _whole_again(work: Workload, trainer: MethodTrainer) -> Any:
    """Return a model in one piece with what an earlier stage has learned, which lies divided in the old one."""
    whole = dict(trainer.engine.whole_tensors()), dict(trainer.method_state())
    trainer.engine.leave()
    assert work.rebuild is not None  # where several processes train
    return work.rebuild(whole)


def stage_steps(stages: Sequence[Stage], recipe: Recipe, rows: Sequence[EncodedRow], processes: int) -> list[int]:
    """Return the optimizer steps of every stage, at least one each.

    Args:
        stages: Of the method.
        recipe: Says how long to train.
        rows: All training rows.
        processes: That train together.
    """
    train = recipe.train
    a_step = train.batch_size * train.gradient_accumulation * processes
    share, more = divmod(train.max_steps or 0, sum(stage.steps is None for stage in stages) or 1)
    lengths = []
    for stage in stages:
        if isinstance(stage.steps, int):
            steps = stage.steps
        elif stage.steps is not None:
            whole = train.max_steps or math.ceil(train.epochs * math.ceil(len(rows) / a_step))
            steps = round(stage.steps * whole)
        elif train.max_steps:
            steps, more = share + (more > 0), more - 1
        else:
            steps = math.ceil(train.epochs * math.ceil(len(stage.choose(rows)) / a_step))
        lengths.append(max(1, steps))
    return lengths


def _batches(work: Workload, stage: Stage) -> Iterator[Mapping[str, torch.Tensor]]:
    return (work.collate([row]) for row in stage.choose(work.train_rows))


def _next_mark(trainer: MethodTrainer | None, index: int, stage: Stage) -> StageMark:
    assert trainer is not None  # a later stage follows one that ran in this process
    return StageMark(index, stage.name, trainer.total_step, trainer.tokens, trainer.supervised, trainer.seconds())


def _interrupted(run: RunDir, step: int, signal_name: str) -> Interrupted:
    return Interrupted(
        f"stopped by {signal_name} after step {step}; a checkpoint is in {run.checkpoints}/checkpoint-{step}. "
        f"Go on with: peftctl train {run.recipe} --resume"
    )


def _select(trainer: MethodTrainer) -> Selected | None:
    """Put the best weights into the model where the recipe wants them, and say what was chosen."""
    train, reporter = trainer.stage.recipe.train, trainer.stage.reporter
    if not (train.load_best or train.early_stopping):
        return None
    if trainer.stopped_early:
        count = "held-out loss" if train.early_stopping == 1 else f"{train.early_stopping} held-out losses in a row"
        reporter.notice(f"stopped early after step {trainer.total_step}: {count} without a new lowest one")
    loss = trainer.state.best_metric
    if train.load_best:
        trainer.take_best()
        reporter.notice(f"took the weights of step {trainer.best_step}, with the lowest held-out loss, {loss:.4g}")
    return Selected(
        best_step=trainer.best_step,
        best_eval_loss=loss,
        step_of_weights=trainer.best_step if train.load_best else trainer.total_step,
        stopped_early=trainer.stopped_early,
    )


def refuse_divergence(trainer: MethodTrainer) -> None:
    """Raise where processes that each hold all weights have come to different ones.

    Raises:
        RunError: A tensor of one process differs from the first one's.
    """
    if trainer.args.world_size == 1 or isinstance(trainer.engine, DividingEngine):
        return
    own = {name: float(p.detach().double().abs().sum()) for name, p in trainer.engine.owned.items()}
    first = processes.from_first(own)
    apart = [name for name, value in own.items() if abs(value - first[name]) > _APART * abs(first[name])]
    if apart:
        raise RunError(
            f"the processes have trained apart: {apart[0]} and {len(apart) - 1} more tensors differ between them; "
            "this method does not work in several processes"
        )


def _totals(trainer: MethodTrainer, selected: Selected | None) -> Trained:
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return Trained(
        steps=trainer.total_step,
        train_tokens=trainer.tokens,
        supervised_tokens=trainer.supervised,
        seconds=trainer.seconds(),
        loss=losses[-1] if losses else float("nan"),
        selected=selected,
        whole=trainer.whole(),
    )
