"""The library's settings for a stage, and the trackers that get its metrics."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from peftctl.artifacts.rundir import RunDir
from peftctl.backends import processes
from peftctl.recipe.schema import Recipe
from peftctl.training.fsdp import SETTINGS
from peftctl.training.optimizers import LIBRARY_NAMES
from peftctl.training.zero import compile_nothing


def library_arguments(
    recipe: Recipe, run: RunDir, *, autocast: str | None, max_steps: int, use_cpu: bool, select: bool, leaves_out: bool
) -> TrainingArguments:
    """Return the library's settings for a stage.

    Args:
        recipe: The run's recipe.
        run: Where checkpoints go.
        autocast: See `autocast_type`.
        max_steps: Optimizer steps of the stage, or -1 for the recipe's epochs.
        use_cpu: No accelerator is present.
        select: Remember the lowest held-out loss.
        leaves_out: See `Method.leaves_out`.
    """
    train = recipe.train
    saving: Mapping[str, Any] = {"save_strategy": "epoch"}
    if train.save_steps:
        saving = {"save_strategy": "steps", "save_steps": train.save_steps}
    evaluating: Mapping[str, Any] = {}
    if train.eval_steps:
        evaluating = {"eval_strategy": "steps", "eval_steps": train.eval_steps}
    if select:
        evaluating = {**evaluating, "metric_for_best_model": "loss", "greater_is_better": False}
    if recipe.backend.name == "deepspeed" and use_cpu:
        compile_nothing()
    dividing: Mapping[str, Any] = {}
    if recipe.backend.name == "fsdp" and processes.size() > 1:
        dividing = {"fsdp": True, "fsdp_config": dict(SETTINGS)}
    return TrainingArguments(
        output_dir=str(run.checkpoints),
        num_train_epochs=train.epochs,
        max_steps=max_steps,
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=recipe.eval.batch_size,
        gradient_accumulation_steps=train.gradient_accumulation,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.scheduler,
        warmup_steps=train.warmup_steps or train.warmup_ratio or 0,
        weight_decay=train.weight_decay,
        optim=LIBRARY_NAMES[train.optimizer],
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        bf16=autocast == "bfloat16",
        fp16=autocast == "float16",
        tf32=None if train.tf32 else False,  # None takes it where the hardware has it
        activation_checkpointing=train.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if train.gradient_checkpointing else None,
        logging_strategy="steps",
        logging_steps=train.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        use_cpu=use_cpu,
        deepspeed=recipe.backend.config,
        ddp_find_unused_parameters=leaves_out,  # looking for them costs a pass over the graph
        ddp_broadcast_buffers=False,  # they are the same everywhere, and stay so
        **saving,
        **evaluating,
        **dividing,
    )


def trackers(recipe: Recipe, run: RunDir) -> list[TrainerCallback]:
    """Return the callbacks of `train.report_to`; what they write stays inside the run directory."""
    return [_TRACKERS[name](run) for name in recipe.train.report_to]


def _tensorboard(run: RunDir) -> TrainerCallback:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(log_dir=str(run.path / "tensorboard")))


def _wandb(run: RunDir) -> TrainerCallback:
    from transformers.integrations import WandbCallback

    os.environ.setdefault("WANDB_DIR", str(run.path))
    return WandbCallback()


_TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb}
