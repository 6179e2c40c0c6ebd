"""`peftctl train`: one recipe from data to a checked artefact in a run directory."""

from __future__ import annotations

import gc
import random
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from peftctl.artifacts import checks, save
from peftctl.artifacts.dtypes import cast_weights
from peftctl.artifacts.load import base_fingerprint, load
from peftctl.artifacts.locate import Artefact
from peftctl.artifacts.manifest import ArtifactInfo
from peftctl.artifacts.rundir import RunDir
from peftctl.artifacts.start import load_start, refuse_other_weights, start_of
from peftctl.backends import device as devices
from peftctl.backends import processes
from peftctl.backends.heap import spare_memory
from peftctl.commands import identity
from peftctl.commands.base_model import load_base, on_merged_base
from peftctl.commands.planning import out_of_memory, predict
from peftctl.commands.prepare import Prepared, fit_rows, prepare
from peftctl.console import Reporter
from peftctl.data.collate import Collator
from peftctl.errors import RunError
from peftctl.evaluation.evaluate import evaluate_rows
from peftctl.methods.base import Context
from peftctl.models.quantize import parameter_count
from peftctl.recipe.schema import Recipe
from peftctl.training.active import active
from peftctl.training.checkpoints import Whole, restore
from peftctl.training.memory import spares_memory
from peftctl.training.report import loss_curve
from peftctl.training.stages import Trained, Workload, run_stages
from peftctl.tuners.task_tensors import become, tasks_of


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind.

    Args:
        run: The run directory.
        artefact: adapter/ or model/ in it.
        summary: The content of summary.json.
    """

    run: Path
    artefact: Path
    summary: Mapping[str, Any]


def train(
    recipe: Recipe, *, resume: bool = False, fresh: bool = False, reporter: Reporter | None = None
) -> TrainResult:
    """Train as the recipe says.

    Args:
        recipe: What to do; see `peftctl.load_recipe`.
        resume: Go on from the last checkpoint of the run in `train.output_dir`.
        fresh: Delete the run in `train.output_dir` first.
        reporter: Shows progress; None is silent.

    Raises:
        PeftctlError: A known problem, see `peftctl.errors`.
    """
    deepspeed = recipe.backend.name == "deepspeed"
    devices.start_process(deepspeed=deepspeed)
    processes.start(alone=deepspeed)
    first = processes.is_first()
    reporter = reporter if reporter and first else Reporter()
    run = RunDir(recipe.train.output_dir)
    if first:
        run.check(fresh=fresh, resume=resume)
    with processes.first_goes_ahead():  # it fills the cache of encoded rows
        ready = prepare(recipe)
    with run.lock() if first else nullcontext():
        finished = processes.from_first(identity.finished_summary(run) if first and resume else None)
        if finished is not None:
            identity.refuse_changes(run, ready)
            reporter.notice(f"{run.path}: this run is complete; nothing to do")
            return TrainResult(run.path, _artefact_path(run), finished)
        if first:
            run.prepare(fresh=fresh, resume=resume)
        try:
            return _Run(ready, run, reporter, resume).go()
        except torch.OutOfMemoryError as error:
            raise RunError(out_of_memory(ready)) from error


class _Run:
    """The steps of one run; state that several of them share."""

    def __init__(self, ready: Prepared, run: RunDir, reporter: Reporter, resume: bool):
        self.ready = ready
        self.recipe = ready.recipe
        self.method = ready.method
        self.run = run
        self.reporter = reporter
        self.resume = resume
        self.first = processes.is_first()
        self.device = devices.current_device()
        self.collate = Collator(ready.tokenizer, self.recipe.data.pad_to_multiple_of)
        # Neither the base nor what is saved reads a method's own fields.
        self.collate_training = Collator(ready.tokenizer, self.recipe.data.pad_to_multiple_of, self.method.fields())

    def go(self) -> TrainResult:
        checkpoint = self._begin()
        set_seed(self.recipe.train.seed)
        if self.device.type == "cpu" and spares_memory(self.recipe, processes.size()):
            spare_memory()
        base = self._base()
        start = start_of(self.recipe)
        on_base = start is None and self.method.base_reads_rows
        before = self._before(base) if on_base else None
        devices.reset_peak_memory()
        model = self._attach(base, start if checkpoint is None else None)
        del base
        if not on_base:  # of the adapter that training starts from, or of the method's own tokens
            before = self._before(model)
            devices.reset_peak_memory()
        if checkpoint is None and self.trainable:
            self._calibrate(model)
        initial = checks.snapshot(model) if self.first else {}  # only now: calibration may choose what trains
        trained = self._train(model, checkpoint)
        peak = max(processes.gathered(devices.peak_memory_bytes()), default=0)
        if not self.first:
            return processes.from_first(None)
        if trained.whole is not None:
            del model
            model = self._rebuilt(trained.whole)
        artefact, references = self._save(model, initial, trained)
        del model, initial
        gc.collect()
        after = self._verify(artefact, references)
        return processes.from_first(self._finish(artefact, trained, peak, before or {}, after))

    def _begin(self) -> Path | None:
        """Write what the run is, merge earlier adapters, and return the checkpoint to go on from."""
        checkpoint = None
        if self.first:
            checkpoint = self._checkpoint()
            identity.write_identity(self.run, self.ready)
        with processes.first_goes_ahead():
            self.ready = on_merged_base(self.ready, self.run, self.reporter)
        self.recipe = self.ready.recipe
        self.predicted = predict(self.ready) if self.first else None
        return processes.from_first(checkpoint)

    def _base(self) -> Any:
        """Return the model before the method is attached."""
        # An engine that divides the weights gets them from main memory: whole, they may not fit on a device.
        base = load_base(self.ready, torch.device("cpu") if self.ready.divided else self.device)
        # Of what lies on disk, so before rows of new tokens.
        self.base_fingerprint = base_fingerprint(self.recipe.model, base)
        fit_rows(base, self.recipe, self.ready.tokenizer)
        return base

    def _before(self, model: Any) -> dict[str, float] | None:
        """Return what the first process measures before training, or has measured before the run was stopped."""
        if not self.first:
            return None
        return identity.evaluation_before(self.run) or self._evaluate(model, "before")

    def _rebuilt(self, whole: Whole) -> Any:
        """Return the trained model in one piece, where the processes each held a part."""
        set_seed(self.recipe.train.seed)
        model = self.method.apply(self._base(), Context(self.recipe, self.ready.tokenizer))
        restore(model, self.method, *whole, where=self.run.checkpoints)
        return model

    def _checkpoint(self) -> Path | None:
        if not self.resume:
            return None
        if not self.run.holds_run():
            self.reporter.notice(f"{self.run.path}: no run to resume; starting from the beginning")
            return None
        identity.refuse_changes(self.run, self.ready)
        checkpoint = self.run.latest_checkpoint()
        step = int(checkpoint.name.split("-")[1]) if checkpoint else 0
        self.run.truncate_metrics(step)
        self.reporter.notice(f"resuming after step {step}")
        return checkpoint

    def _attach(self, base: Any, start: Artefact | None) -> Any:
        """Apply the method, with the weights of `start`, and count what trains; return the model."""
        expected = self.method.count(base)
        model = self.method.apply(base, Context(self.recipe, self.ready.tokenizer))
        if start is not None:
            refuse_other_weights(start, self.recipe, self.base_fingerprint)
            load_start(start, model)
            self.reporter.notice(f"training goes on from {start.target}")
        self.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.total = parameter_count(model)
        if self.trainable != expected:
            raise RunError(f"{self.recipe.method.name} trains {self.trainable:,} parameters, expected {expected:,}")
        for notice in self.ready.notices:
            self.reporter.notice(notice)
        self.reporter.notice(
            f"{self.recipe.method.name}: {self.trainable:,} of {self.total:,} parameters train "
            f"({self.trainable / self.total:.2%}) on {self.device}"
        )
        self.active = [] if not self.trainable else list(active(self.recipe, self.method, model, self.device.type))
        if self.active:
            self.reporter.notice(f"steps: {'; '.join(self.active)}")
        return model

    def _calibrate(self, model: Any) -> None:
        """Show the method the training rows, in an order of their own: a file may be sorted by what they are about."""
        rows = self.ready.train_rows
        order = random.Random(self.recipe.train.seed).sample(range(len(rows)), len(rows))
        self.method.calibrate(model, (self.collate_training([rows[i]]) for i in order))

    def _train(self, model: Any, checkpoint: Path | None) -> Trained:
        if self.trainable == 0:
            return Trained(steps=0, train_tokens=0, supervised_tokens=0, seconds=0.0, loss=float("nan"))
        work = Workload(
            recipe=self.recipe,
            method=self.method,
            train_rows=self.ready.train_rows,
            eval_rows=self.ready.eval_rows,
            collate=self.collate_training,
            run=self.run,
            reporter=self.reporter,
            rebuild=self._rebuilt,
        )
        return run_stages(work, model, checkpoint)

    def _save(
        self, model: Any, initial: dict[str, str], trained: Trained
    ) -> tuple[Path, dict[str | None, torch.Tensor]]:
        """Write the artefact, check its files, and return the logits that it, or each of its tasks, must reproduce."""
        model.eval()
        if self.method.autocast:  # float32 weights were for training; the artefact has the recipe's dtype
            cast_weights(model, devices.dtype_of(self.recipe.model.dtype))
        gates_off = self.method.card.gates_off
        if "moved" not in gates_off:
            checks.check_moved(model, initial)
        save.save_parts(self.method.parts(model), self.run)
        exported = self.method.export(model)
        references = self._references(model if exported is None else exported)
        info = ArtifactInfo(
            method=self.recipe.method.name,
            card=self.method.card,
            recipe=self.recipe,
            base_fingerprint=self.base_fingerprint,
            facts={
                "trainable_parameters": self.trainable,
                "steps": trained.steps,
                "data_fingerprint": self.ready.data_fingerprint,
                "train_loss": trained.loss,
            },
        )
        return save.save_artifact(exported, self.ready.tokenizer, self.run, info), references

    def _references(self, exported: Any) -> dict[str | None, torch.Tensor]:
        """Return the logits of every task, the default one last, or of the artefact itself."""
        tasks, found = tasks_of(exported), {}
        for task in sorted(tasks.tensors, key=lambda name: name == tasks.default) if tasks else [None]:
            if task is not None:
                become(exported, task)
            found[task] = checks.probe_logits(exported, self._probe())
        return found

    def _probe(self) -> list[list[int]]:
        rows = self.ready.eval_rows or self.ready.train_rows
        return [row.input_ids for row in rows[:4]]

    def _verify(self, artefact: Path, references: dict[str | None, torch.Tensor]) -> dict[str, float]:
        """Reload the artefact, task by task, compare logits, and evaluate what was reloaded last."""
        model = None
        for task, reference in references.items():
            del model  # before another one takes its memory
            model, _ = load(str(artefact), task=task, device=self.device)
            checks.check_reload(reference, model, self._probe(), artefact)
        return self._evaluate(model, "after")

    def _evaluate(self, model: Any, when: str) -> dict[str, float]:
        if not self.ready.eval_rows:
            return {}
        self.reporter.notice(f"evaluating {when} training on {len(self.ready.eval_rows)} held-out rows ...")
        result = evaluate_rows(
            model,
            self.ready.tokenizer,
            self.ready.eval_examples,
            self.ready.eval_rows,
            self.recipe.data,
            self.recipe.eval,
            self.collate,
        )
        if when == "before":
            identity.record_before(self.run, result.metrics)
        else:
            content = {"metrics": result.metrics, "base": None, "samples": result.samples}
            self.run.write_json(self.run.eval, content)
        return result.metrics

    def _finish(
        self, artefact: Path, trained: Trained, peak: int, before: dict[str, float], after: dict[str, float]
    ) -> TrainResult:
        summary = {
            "method": self.recipe.method.name,
            "trainable_parameters": self.trainable,
            "total_parameters": self.total,
            "active": self.active,
            "steps": trained.steps,
            "train_tokens": trained.train_tokens,
            "supervised_tokens": trained.supervised_tokens,
            "train_seconds": round(trained.seconds, 2),
            "tokens_per_second": round(trained.train_tokens / trained.seconds, 1) if trained.seconds else None,
            "peak_memory_bytes": peak,
            "predicted_memory_bytes": self.predicted,
            "adapter_bytes": sum(f.stat().st_size for f in artefact.rglob("*.safetensors")),
            "train_loss": trained.loss if trained.steps else None,
            **({"selected": asdict(trained.selected)} if trained.selected else {}),
            "eval": {"before": before, "after": after},
        }
        self.run.write_json(self.run.summary, summary)
        if trained.steps:
            loss_curve(self.run.metrics, self.run.path / "loss.png")
        return TrainResult(self.run.path, artefact, summary)


def _artefact_path(run: RunDir) -> Path:
    return run.model if run.model.is_dir() else run.adapter
