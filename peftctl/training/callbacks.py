"""What happens between the library's steps: progress, stop requests, and a method's own schedules."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from peftctl.methods.base import Callback, StepInfo

if TYPE_CHECKING:
    from peftctl.training.trainer import MethodTrainer


class StopAndShow(TrainerCallback):
    """Shows progress, and turns a stop request into a checkpoint and an end."""

    def __init__(self, trainer: MethodTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clocks of the stage."""
        self.trainer.started = self.trainer.logged_at = time.monotonic()
        self.trainer.logged_step = state.global_step
        self.trainer.stage.reporter.begin(self.trainer.stage.mark.name, state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show the step, log the last one, and heed a stop request."""
        self.trainer.stage.reporter.step(state.global_step)
        control.should_log |= state.global_step >= state.max_steps
        if self.trainer.stopped_by_signal:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the bar."""
        self.trainer.stage.reporter.end()


class Hooks(TrainerCallback):
    """Adapts a method's torch-free Callback to the library's."""

    def __init__(self, trainer: MethodTrainer, callback: Callback):
        self.trainer = trainer
        self.callback = callback

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before the first step of the stage."""
        self._call(self.callback.stage_begins)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Gradients are complete, weights are old."""
        if not self.trainer.left_out:
            self._call(self.callback.before_optimizer)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Weights are new, gradients are still there."""
        if not self.trainer.left_out:
            self._call(self.callback.after_optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The step is finished."""
        self._call(self.callback.after_step)

    def _call(self, hook: Callable[[StepInfo], None]) -> None:
        trainer = self.trainer
        state, engine = trainer.state, trainer.engine
        info = StepInfo(state.global_step, state.max_steps, trainer.model, engine.forget, engine.whole)
        hook(info)
        trainer.extra.update(info.log)
