"""The Trainer's side of an engine: it builds the optimizer and the engine over it, and writes and reads checkpoints.

Every engine writes the same files: whole tensors and whole optimizer state. So a run may go on in another number of
processes, or through another engine.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from peftctl.artifacts.rundir import staged
from peftctl.backends import processes
from peftctl.methods.base import Callback
from peftctl.training import fsdp
from peftctl.training.checkpoints import OPTIMIZER, StageMark, read_mark, read_state, write_state
from peftctl.training.engine import Engine
from peftctl.training.optimizers import build_optimizer
from peftctl.training.workload import StageRun
from peftctl.training.zero import Zero

_SCHEDULER = "scheduler.pt"


class EngineTrainer(Trainer):
    """A Trainer that knows the engine it trains through.

    Args:
        stage: What to train on and where to write.
        model: The model that `Method.apply` returned.
        schedules: The method's callbacks.
        options: Of the library's Trainer.
    """

    def __init__(self, stage: StageRun, *, model: Any, schedules: Sequence[Callback], **options: Any):
        self.stage = stage
        self.model: Any = model
        self.engine: Engine
        self.optimizer: Any
        self.lr_scheduler: Any
        self.schedules = schedules
        self.state_before: dict[str, Any] | None = None
        super().__init__(model=model, **options)
        self.add_callback(_Step(self))  # the last one: the others see the gradients before it

    def create_accelerator_and_postprocess(self) -> None:
        """Let the library build its engine."""
        with fsdp.on_any_device() if self.args.fsdp else nullcontext():
            super().create_accelerator_and_postprocess()

    @property
    def total_step(self) -> int:
        """Optimizer steps since the run began, over all stages."""
        return self.stage.mark.offset + self.state.global_step

    def create_optimizer(self, model: Any = None) -> Any:
        """Build the optimizer of this stage, and the engine over it."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.stage.method, self.model, self.args, self.stage.recipe.train)
            self.engine = self._engine()
            if self.engine.divides_weights and not self.schedules:
                self.state_before = self.stage.method.state_dict(self.model)
        return self.optimizer

    def _engine(self) -> Engine:
        if self.is_fsdp_enabled:
            return fsdp.Fsdp(self.model, self.optimizer)
        if not self.is_deepspeed_enabled:
            return Engine(self.model, self.optimizer)
        return Zero(
            self.model,
            self.optimizer,
            stage=self.accelerator.deepspeed_plugin.zero_stage,
            max_norm=self.args.max_grad_norm,
            keep_whole=self.stage.method.loss_reads_weights,
            show_gradients=any(_sees_gradients(type(schedule)) for schedule in self.schedules),
        )

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def write_checkpoint(self, place: Path, mark: StageMark) -> None:
        """Gather what the processes hold, and let the first one write it."""
        tensors = self.engine.whole_tensors()
        optimizer = self.engine.optimizer_state()
        random_states = self._random_states()
        if not processes.is_first():
            return
        with staged(place) as folder:
            folder.mkdir(exist_ok=True)
            write_state(folder, tensors, self.method_state(), mark)
            torch.save(optimizer, folder / OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), folder / _SCHEDULER)
            self._save_scaler(str(folder))
            for name, content in random_states.items():
                (folder / name).write_bytes(content)
            self.state.save_to_json(str(folder / "trainer_state.json"))
        self._drop_old_checkpoints()

    def method_state(self) -> Mapping[str, Any]:
        """Return the method's state; where weights are divided and no schedule changes it, as the stage began."""
        return self.stage.method.state_dict(self.model) if self.state_before is None else self.state_before

    def _random_states(self) -> dict[str, bytes]:
        """Return the files with the random state of every process."""
        with TemporaryDirectory() as folder:
            self._save_rng_state(folder)
            own = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
        return {name: content for files in processes.gathered(own) for name, content in files.items()}

    def _drop_old_checkpoints(self) -> None:
        """Keep the newest, and those with the best weights of each of these: a resume may start from any of them."""
        newest = self.stage.run.complete_checkpoints()[-self.stage.recipe.train.save_total_limit :]
        best = {f"checkpoint-{read_mark(folder).best}" for folder in newest}
        self.stage.run.drop_checkpoints({*(folder.name for folder in newest), *best})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing where the library would read weights of its own: `_prepare_for_training` reads ours."""

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[Any, Any]:
        """Build the engine; of a checkpoint, weights are read before an engine divides them, the optimizer after."""
        folder = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if folder:
            read_state(folder, self.model, self.stage.method)
        with _quiet():
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.engine.begin(self)
        if folder:
            self.engine.load(folder)
            self._load_scaler(str(folder))
            self.lr_scheduler.load_state_dict(torch.load(folder / _SCHEDULER, weights_only=True))
        return prepared


def _sees_gradients(kind: type[Callback]) -> bool:
    hooks = (kind.before_optimizer, kind.after_optimizer)
    return hooks != (Callback.before_optimizer, Callback.after_optimizer)


class _Step(TrainerCallback):
    """Lets the engine step where the library's optimizer does."""

    def __init__(self, trainer: EngineTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Step, unless the gradients were dropped."""
        self.trainer.engine.step()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the libraries say while they build the engine off the screen: nothing that a user could act on."""
    logger = logging.getLogger("accelerate.accelerator")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        logger.setLevel(level)
