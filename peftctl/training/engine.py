"""What the engines have in common: the optimizer over a method's groups, and checkpoints that any of them goes on from.

One process, several that each hold everything (DDP), ZeRO's stages and FSDP write the same files: whole tensors and
whole optimizer state. So a run may go on in another number of processes, or through another engine.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import Trainer

from peftctl.artifacts.rundir import staged
from peftctl.backends import processes
from peftctl.training import fsdp, zero
from peftctl.training.checkpoints import TENSORS, StageMark, read_mark, read_state, write_state
from peftctl.training.optimizers import build_optimizer, optimized_tensors
from peftctl.training.workload import StageRun

_OPTIMIZER, _SCHEDULER = "optimizer.pt", "scheduler.pt"


class EngineTrainer(Trainer):
    """A Trainer that knows the engine it trains through.

    Args:
        stage: What to train on and where to write.
        model: The model that `Method.apply` returned.
        options: Of the library's Trainer.
    """

    def __init__(self, stage: StageRun, *, model: Any, **options: Any):
        self.stage = stage
        self.model: Any = model
        self.owned: dict[str, torch.Tensor] = {}
        self.optimizer: Any
        self.lr_scheduler: Any
        self.groups: zero.Groups = []
        self.state_before: dict[str, Any] | None = None
        super().__init__(model=model, **options)

    def create_accelerator_and_postprocess(self) -> None:
        """Let the library build its engine."""
        with fsdp.on_any_device() if self.args.fsdp else nullcontext():
            super().create_accelerator_and_postprocess()

    @property
    def total_step(self) -> int:
        """Optimizer steps since the run began, over all stages."""
        return self.stage.mark.offset + self.state.global_step

    @property
    def zero_stage(self) -> int:
        """What the processes divide, by ZeRO's stages; 0 where each holds everything."""
        return self.accelerator.deepspeed_plugin.zero_stage if self.is_deepspeed_enabled else 0

    @property
    def divided(self) -> bool:
        """Whether each process holds only a part of the model."""
        return self.zero_stage == 3 or self.is_fsdp_enabled

    def create_optimizer(self, model: Any = None) -> Any:
        """Build the optimizer of this stage."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.stage.method, self.model, self.args, self.stage.recipe.train)
            self.owned = optimized_tensors(self.optimizer, self.model)  # an engine puts flat tensors in their place
            self.groups = [list(group["params"]) for group in self.optimizer.param_groups]
        return self.optimizer

    def leave_engine(self) -> None:
        """Make the model an ordinary one again; what FSDP has divided stays so."""
        if self.is_deepspeed_enabled:
            zero.leave(self.deepspeed)
        elif self.is_fsdp_enabled:
            fsdp.leave()

    def whole_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that train, by name, in one piece each; every process calls this."""
        if self.is_fsdp_enabled:
            return fsdp.whole_tensors(self.owned)
        return zero.whole_tensors(self.owned) if self.is_deepspeed_enabled else self.owned

    def _whole_optimizer(self) -> dict[str, Any]:
        """Return the optimizer's state as one process would have it; every process calls this."""
        if self.is_fsdp_enabled:
            return fsdp.optimizer_state(self.optimizer)
        if self.is_deepspeed_enabled:
            return zero.optimizer_state(self.deepspeed, self.groups)
        return self.optimizer.state_dict()

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def write_checkpoint(self, place: Path, mark: StageMark) -> None:
        """Gather what the processes hold, and let the first one write it."""
        tensors = self.whole_tensors()
        optimizer = self._whole_optimizer()
        random_states = self._random_states()
        if not processes.is_first():
            return
        with staged(place) as folder:
            folder.mkdir(exist_ok=True)
            write_state(folder, tensors, self.method_state(), mark)
            torch.save(optimizer, folder / _OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), folder / _SCHEDULER)
            self._save_scaler(str(folder))
            for name, content in random_states.items():
                (folder / name).write_bytes(content)
            self.state.save_to_json(str(folder / "trainer_state.json"))
        self._drop_old_checkpoints()

    def method_state(self) -> dict[str, Any]:
        """Return the method's state; where weights are divided, as it was when the stage began."""
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
        """Restore the optimized tensors and the method's state."""
        read_state(Path(resume_from_checkpoint), self.model, self.stage.method)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[Any, Any]:
        """Build the engine; of a checkpoint, weights are read before an engine divides them, the optimizer after."""
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint:
            self._load_from_checkpoint(resume_from_checkpoint)
        if self.divided:
            self.state_before = self.stage.method.state_dict(self.model)
        with _quiet():
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self.is_fsdp_enabled:  # parameters that are divided stand in their places
            divided = dict(self.model.named_parameters())
            self.owned = {name: divided[name] for name in self.owned}
            self.groups = []  # they would keep the whole ones
        if resume_from_checkpoint:
            self._load_optimizer(Path(resume_from_checkpoint))
        return prepared

    def _load_optimizer(self, folder: Path) -> None:
        """Divide the optimizer's state of a checkpoint among the processes, and restore the schedule."""
        saved = torch.load(folder / _OPTIMIZER, weights_only=True)
        if self.is_fsdp_enabled:
            fsdp.load_optimizer_state(self.optimizer, saved)
            self._load_scaler(str(folder))
        else:
            zero.load_optimizer_state(self.deepspeed, self.groups, saved)
            zero.load_tensors(self.deepspeed, self.owned, load_file(folder / TENSORS))
        self.lr_scheduler.load_state_dict(torch.load(folder / _SCHEDULER, weights_only=True))


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
