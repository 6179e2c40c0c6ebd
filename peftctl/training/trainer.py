"""One transformers Trainer for every method: it asks the method for groups, loss and schedules.

It differs from the library's in six things: logits only at supervised positions; batches of rows of similar length,
dealt from the global batch; the loss scaled once by the supervised tokens of the step; checkpoints written aside and
renamed; a stop request read at the end of each step; and a non-finite gradient ends the run before it reaches a weight.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainingArguments

from peftctl.backends import device as devices
from peftctl.backends import processes
from peftctl.data.batching import GroupedBatches
from peftctl.data.encode import EncodedRow
from peftctl.data.table import sizes_of
from peftctl.errors import RunError
from peftctl.evaluation.loss import held_out_loss
from peftctl.models.lean_blocks import lean_blocks, lean_forwards
from peftctl.models.short_attention import short_rows
from peftctl.models.supervised import IGNORED, Supervised, count_supervised, supervised_forward
from peftctl.training.arguments import trackers
from peftctl.training.callbacks import Hooks, StopAndShow
from peftctl.training.checkpoints import StageMark
from peftctl.training.noise import noisy_embeddings
from peftctl.training.passes import cut, pass_tokens
from peftctl.training.report import MetricsFile
from peftctl.training.selection import SelectingTrainer
from peftctl.training.waiting_head import head_can_wait
from peftctl.training.workload import StageRun

_SHOWN = 8
"""Rows that an error names."""
_LOWEST_SCALE = 1.0
"""Of float16's loss scaler, which begins at 65,536: a gradient that is still not finite here is no matter of scale."""


class _EpochLoader(DataLoader):
    """Passes the epoch on to the batch sampler, which the Trainer does only for wrapped loaders."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def _tokens(batch: Mapping[str, torch.Tensor]) -> int:
    """Return the tokens of a micro-batch without padding; one without a row is a token of padding."""
    return int(batch["attention_mask"].sum()) if (batch["labels"] != IGNORED).any() else 0


def _some(rows: Sequence[str]) -> str:
    more = len(rows) - _SHOWN
    return ", ".join(rows[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _product(shape: Callable[[int], float], factor: Callable[[int], float], span: int | None) -> Callable[[int], float]:
    return lambda step: shape(step % span if span else step) * factor(step)


class MethodTrainer(SelectingTrainer):
    """Trains one stage of one method.

    Args:
        stage: What to train on and where to write.
        model: The model that `Method.apply` returned.
        args: Library settings made by `stages.py`.
    """

    def __init__(self, stage: StageRun, model: Any, args: TrainingArguments):
        self.parts: dict[str, Any] = defaultdict(float)  # device tensors, read only at log steps
        self.tokens = stage.mark.train_tokens
        self.supervised = stage.mark.supervised_tokens
        self.seconds_before = stage.mark.seconds
        self.started = self.logged_at = time.monotonic()
        self.logged_tokens = (self.tokens, self.supervised)
        self.metrics_file = MetricsFile(stage.run.metrics)
        self.extra: dict[str, float] = {}
        self.logged_step = 0
        self.saved_at = -1
        self.stop_agreed = False
        self.left_out = False  # the step at hand
        self.step_rows: list[str] = []
        self.pass_tokens = pass_tokens(stage.recipe, stage.method, devices.current_device().type)
        self.share = 1.0  # of the micro-batch's rows, in the pass at hand
        schedules = stage.method.callbacks(model)
        super().__init__(
            stage,
            model=model,
            schedules=schedules,
            args=args,
            train_dataset=stage.train_rows,  # type: ignore[arg-type]
            eval_dataset=stage.eval_rows or None,  # type: ignore[arg-type]
            data_collator=stage.collate,
            callbacks=[
                *(Hooks(self, callback) for callback in schedules),
                StopAndShow(self),
                *(trackers(stage.recipe, stage.run) if processes.is_first() else ()),
            ],
        )
        self.remove_callback(PrinterCallback)
        self.lean = lean_forwards(model) if devices.current_device().type == "cpu" else []

    # -- data ----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Return batches of rows of similar length; order and grouping follow from (seed, epoch, global batch)."""
        train = self.stage.recipe.train
        sampler = GroupedBatches(
            [size.tokens for size in sizes_of(self.stage.train_rows)],
            batch_size=train.batch_size,
            accumulation=train.gradient_accumulation,
            seed=train.seed,
            world_size=self.args.world_size,
            rank=self.args.process_index,
        )
        return _EpochLoader(
            self.stage.train_rows,  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=self._collate,
            generator=torch.Generator(),  # its own, so that loading draws nothing from the run's random state
            pin_memory=torch.cuda.is_available(),
        )

    def _collate(self, rows: Sequence[EncodedRow]) -> list[dict[str, torch.Tensor]]:
        """Make a micro-batch, a batch for each pass, and remember where its rows come from."""
        self.step_rows += [row.where for row in rows]
        parts = cut([row.tokens for row in rows], self.pass_tokens)
        return [self.stage.collate(rows[part]) for part in parts]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Return this process's micro-batches of one optimizer step, and the supervised tokens of all processes'."""
        self.step_rows.clear()
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        passes = [one for batch in batches for one in batch]
        own = [
            sum(count_supervised(self.model, one["labels"]) for one in passes),
            sum(_tokens(one) for one in passes),
            bool(self.stage.stop),
        ]
        supervised, tokens, stops = (int(count) for count in processes.summed(own))
        self.stop_agreed = stops > 0  # all end after the same step, whichever has got the signal
        self.supervised += supervised
        self.tokens += tokens
        if self.model.config.is_encoder_decoder:
            self.tokens += supervised  # the decoder's
        return batches, supervised

    # -- loss ----------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Run the passes of a micro-batch; processes add their gradients up in the last one."""
        rows = [len(one["input_ids"]) for one in inputs]
        losses = []
        for i, one in enumerate(inputs):
            self.share = rows[i] / sum(rows)
            sync = nullcontext() if i == len(inputs) - 1 else self.accelerator.no_sync(model)
            with short_rows(), lean_blocks(self.lean), sync:
                losses.append(super().training_step(model, one, num_items_in_batch))
        return torch.stack(losses).sum()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return the loss of a pass, scaled so that the passes of a step add up to its mean."""
        parts = self.stage.method.loss(self.model, inputs, lambda batch: self._forward(model, batch))
        # Gradients are averaged over processes, and this is a share of the sum over all of them.
        total = parts.pop("loss") * self.args.world_size / max(num_items_in_batch, 1)
        self._count("loss", total)
        for name, part in parts.items():
            scaled = part * self.share / self.current_gradient_accumulation_steps
            self._count(name, scaled)
            total = total + scaled
        # The library divides by the accumulation where it believes that nobody scaled the loss.
        self.loss_is_scaled_for_ga = True
        return total

    def _forward(self, model: Any, batch: Mapping[str, torch.Tensor]) -> Supervised:
        """Run the model as in training, which evaluation never does: with noise and smoothed labels."""
        train = self.stage.recipe.train
        lean = not self.engine.divides_weights and head_can_wait(self.model, batch)
        with noisy_embeddings(self.model, batch["attention_mask"], train.neftune_noise):
            result = supervised_forward(self.model, batch, model, smoothing=train.label_smoothing, lean=lean)
        self.engine.forward_ends()
        return result

    def _count(self, name: str, value: torch.Tensor) -> None:
        self.parts[name] += value.detach()

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the norm before clipping, and keep a gradient that is not finite from the weights."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.left_out = not torch.isfinite(torch.as_tensor(norm))
        if self.left_out and not self._scaler_skips():
            self._on_nan()
        return norm

    def _scaler_skips(self) -> bool:
        """Tell whether float16's loss scaler leaves the step out and goes on with a smaller scale."""
        scaler = self.accelerator.scaler
        if scaler is None:  # DeepSpeed has one of its own
            return self.is_deepspeed_enabled and self.args.fp16
        return scaler.get_scale() > _LOWEST_SCALE

    def _on_nan(self) -> None:
        """Leave the step out, or end the run, as the recipe says; all processes have the same gradient.

        Raises:
            RunError: With the step and its rows.
        """
        rows = [where for places in processes.gathered(self.step_rows) for where in places]
        what = f"step {self.total_step + 1}: the gradient is not finite; its rows: {_some(rows)}"
        if self.stage.recipe.train.on_nan == "skip":
            self.engine.skip_step()
            self.stage.reporter.notice(f"{what}; left out")
            return
        kept = "no weight was changed by it"
        if self.state.global_step:
            self._save_checkpoint(self.model, None)
            kept += f", and checkpoint-{self.total_step} has them"
        hint = "Lower train.learning_rate, train in float32, look at the rows, or set train.on_nan=skip"
        raise RunError(f"{what}; {kept}. {hint}")

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: the library's estimate walks all parameters at every micro-step."""
        return 0

    # -- optimizer -----------------------------------------------------------------------------------------------

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Build the recipe's schedule, which may begin anew several times, times the method's factor."""
        if self.lr_scheduler is None:
            span = self.stage.method.schedule_steps(num_training_steps)
            scheduler: Any = super().create_scheduler(span, optimizer)
            factor = partial(self.stage.method.learning_rate_factor, total_steps=num_training_steps)
            again = span < num_training_steps
            scheduler.lr_lambdas = [_product(shape, factor, span if again else None) for shape in scheduler.lr_lambdas]
        return self.lr_scheduler

    # -- log and evaluate ----------------------------------------------------------------------------------------

    def seconds(self) -> float:
        """Training time of the run so far."""
        return self.seconds_before + time.monotonic() - self.started

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write one line of metrics and show it."""
        if "train_runtime" in logs:  # the library's closing summary; ours is summary.json
            return
        line: dict[str, Any] = {"step": self.total_step, "stage": self.stage.mark.name}
        line["epoch"] = round(self.state.epoch or 0.0, 4)
        if "loss" in logs:
            self._tr_loss.zero_()  # the library subtracts it from itself, which leaves NaN where it was NaN
            logs = logs | self._interval()
        line |= logs | self.extra
        self.extra.clear()
        if processes.is_first():
            self.metrics_file.write(line)
        self.state.log_history.append(line)
        self.stage.reporter.step(self.state.global_step, line)
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def _interval(self) -> dict[str, float]:
        """Return speed and loss parts since the last log step."""
        now = time.monotonic()
        passed = max(now - self.logged_at, 1e-9)
        steps = max(self.state.global_step - self.logged_step, 1)
        tokens, supervised = self.tokens - self.logged_tokens[0], self.supervised - self.logged_tokens[1]
        self.logged_at, self.logged_step = now, self.state.global_step
        self.logged_tokens = (self.tokens, self.supervised)
        parts: dict[str, float] = {}
        if len(self.parts) > 1:
            means = processes.summed([float(value) / steps / self.args.world_size for value in self.parts.values()])
            parts = dict(zip(self.parts, means, strict=True))
        self.parts.clear()
        speed = {"tokens_per_second": tokens / passed, "supervised_tokens_per_second": supervised / passed}
        return {f"loss_{name}" if name == "loss" else name: v for name, v in parts.items()} | speed

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return and log the held-out loss; the time it takes does not count as training."""
        began = time.monotonic()
        size = self.stage.recipe.eval.batch_size
        held_out = held_out_loss(self.model, self.stage.eval_rows, self.stage.collate, size, together=True)
        metrics = {f"eval_{name}": float(value) for name, value in held_out.items()}
        if self.args.metric_for_best_model:
            metrics = metrics | self._select(metrics)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        passed = time.monotonic() - began
        self.started, self.logged_at = self.started + passed, self.logged_at + passed
        return metrics

    # -- checkpoints ---------------------------------------------------------------------------------------------

    @property
    def stopped_by_signal(self) -> bool:
        """Whether the stage ended early because a process got a signal."""
        return self.stop_agreed if self.args.world_size > 1 else bool(self.stage.stop)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write everything that resume needs aside, then rename it into place."""
        if self.saved_at == self.total_step:  # a stop request at the end of an epoch asks twice
            return
        self.saved_at = self.total_step
        began = time.monotonic()
        mark = StageMark(
            index=self.stage.mark.index,
            name=self.stage.mark.name,
            offset=self.stage.mark.offset,
            train_tokens=self.tokens,
            supervised_tokens=self.supervised,
            seconds=self.seconds(),
            best=self.best_step if self.stage.recipe.train.load_best else None,
        )
        self.write_checkpoint(self.stage.run.checkpoints / f"checkpoint-{self.total_step}", mark)
        self.logged_at += time.monotonic() - began
