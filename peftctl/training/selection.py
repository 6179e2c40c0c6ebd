"""Which weights a stage ends with: the last ones, or those with the lowest held-out loss; and when it ends early.

Held-out losses are in the log, and the lowest one in the library's state: both are in every checkpoint, so a resumed
run goes on as if it had not been stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftctl.backends import processes
from peftctl.errors import RunError
from peftctl.training.checkpoints import Whole, read_state, read_tensors
from peftctl.training.engine_trainer import EngineTrainer


class SelectingTrainer(EngineTrainer):
    """A Trainer that remembers the lowest held-out loss; for the arguments see `EngineTrainer`."""

    @property
    def best_step(self) -> int | None:
        """Optimizer steps of the run at the lowest held-out loss; None before there is one."""
        best = self.state.best_global_step
        return None if best is None else self.stage.mark.offset + best

    @property
    def stopped_early(self) -> bool:
        """Whether the stage ended before its last step for want of a new lowest held-out loss."""
        return self._ends_after(self._waited())

    def _waited(self) -> int:
        """Return how many held-out losses since the lowest one are in the log, which a checkpoint holds too."""
        measured = [line["step"] for line in self.state.log_history if "eval_loss" in line]
        return sum(step > (self.best_step or 0) for step in measured)

    def _ends_after(self, waited: int) -> bool:
        patience = self.stage.recipe.train.early_stopping if self.stage.is_main else None
        return patience is not None and waited >= patience and self.state.global_step < self.state.max_steps

    def _select(self, metrics: dict[str, float]) -> dict[str, Any]:
        """Compare a held-out loss with the lowest one, which the library keeps in the state; return what to log."""
        waited = self._waited() + 1
        if self._determine_best_metric(metrics, None):
            waited = 0
            self.control.should_save |= self.stage.recipe.train.load_best
        best = {} if self.best_step is None else {"best_step": self.best_step, "best_eval_loss": self.state.best_metric}
        if not self._ends_after(waited):
            return best
        self.control.should_save = self.control.should_training_stop = True
        return best | {"stopped_early": True}

    def _run_epoch(self, *args: Any, **where: Any) -> None:
        """Train an epoch; a run that is resumed after its last step or its early stop has none left."""
        if self.stopped_early or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **where)

    def best_checkpoint(self) -> Path:
        """Return the checkpoint of the lowest held-out loss.

        Raises:
            RunError: No held-out loss was finite.
        """
        if self.best_step is None:
            raise RunError("train.load_best: no held-out loss was finite; lower train.learning_rate")
        processes.wait()  # the first process writes it
        return self.stage.run.checkpoints / f"checkpoint-{self.best_step}"

    def take_best(self) -> None:
        """Put the weights of the lowest held-out loss into the model, where it is whole.

        Raises:
            ArtifactError: Their checkpoint is missing or damaged.
            RunError: No held-out loss was finite.
        """
        folder = self.best_checkpoint()
        if not self.engine.divides_weights:
            read_state(folder, self.model, self.stage.method)

    def whole(self) -> Whole | None:
        """Return what a model that lies divided among the processes has learned; None for a whole one."""
        if not self.engine.divides_weights:
            return None
        if self.stage.recipe.train.load_best:
            return read_tensors(self.best_checkpoint())
        return dict(self.engine.whole_tensors()), dict(self.method_state())
