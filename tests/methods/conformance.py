"""What the conformance suite works on: every method on every tiny model that its card claims, each trained once.

A case is a method, configured by the `method:` section of its shipped recipe, on a tiny model. It trains 10 steps of
the real trainer on one batch, with a checkpoint after 5; the checks of test_conformance.py read what that left.
Further runs (resumed, accumulated, recomputed) start from that checkpoint, so that their weights are the same.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

import peftctl
from peftctl.artifacts import save
from peftctl.artifacts.checks import probe_logits
from peftctl.artifacts.dtypes import cast_weights
from peftctl.artifacts.load import base_fingerprint
from peftctl.artifacts.manifest import ArtifactInfo
from peftctl.artifacts.rundir import RunDir
from peftctl.commands.prepare import as_trained
from peftctl.console import Reporter
from peftctl.data.collate import Collator
from peftctl.data.encode import EncodedRow
from peftctl.data.formats import Example, Message
from peftctl.errors import Interrupted
from peftctl.methods import registry
from peftctl.methods.base import Card, Context, Method
from peftctl.models.load import load_model, meta_model
from peftctl.recipe.schema import ModelSection, QuantizationSection, Recipe
from peftctl.recipe.write import dump_recipe
from peftctl.training.checkpoints import read_mark
from peftctl.training.stages import Workload, run_stages
from peftctl.training.trainer import MethodTrainer
from tests import tiny
from tests.methods.conformance_models import CARDS, LABELS, MODELS, OVERRIDES, RENAMED, head_of
from tests.methods.earlier import ONE_STAGE
from tests.training.test_resume import StopAt

HALF = 5
"""Optimizer steps to the checkpoint; a straight run has twice as many."""
EARLY = 3
"""Optimizer steps after which everything that trains must have moved."""
PROBE = [list(range(5, 17)), list(range(40, 60))]


@dataclass(frozen=True)
class Saved:
    """An artefact, and what it must answer.

    Args:
        folder: adapter/ or model/.
        keys: Names of its tensors; None where it is no adapter.
        logits: Of the exported model on the probe.
        off: The same with the adapter switched off; None where there is none.
    """

    folder: Path
    keys: set[str] | None
    logits: torch.Tensor
    off: torch.Tensor | None


@dataclass(frozen=True)
class Straight:
    """What the straight run of a case left.

    Args:
        initial: Every parameter and buffer, before training.
        final: The same after training, before the export.
        trainable: Names of what trains, as applied.
        base_moved: Names of the base's tensors that changed although they do not train.
        base_lost: Names of the base's tensors that the model no longer has.
        seen: Gradients, and the tensors that the optimizer owned.
        run: The run directory.
        off: Logits with the adapter switched off, before the export; None where there is none.
        saved: The artefact.
    """

    initial: dict[str, torch.Tensor]
    final: dict[str, torch.Tensor]
    trainable: set[str]
    base_moved: set[str]
    base_lost: set[str]
    seen: Recorder
    run: RunDir
    off: torch.Tensor | None
    saved: Saved

    @property
    def checkpoint(self) -> Path:
        """The checkpoint in the middle."""
        return self.run.checkpoints / f"checkpoint-{HALF}"

    def losses(self) -> list[float]:
        """Return the cross-entropy of every step, without the method's further parts."""
        lines = [json.loads(line) for line in self.run.metrics.read_text().splitlines()]
        return [line.get("loss_loss", line["loss"]) for line in lines if "loss" in line]


@dataclass(frozen=True)
class Continued:
    """One step from an early checkpoint: its gradients, and the supervised tokens of the run so far."""

    gradients: dict[str, torch.Tensor]
    supervised_tokens: int


@dataclass
class Recorder:
    """What the trainer is about to do at each optimizer step of a run.

    Args:
        gradients: Step -> name -> gradient.
        early: What trains, by name, after EARLY steps.
        optimized: Names of the tensors that the optimizer owns.
    """

    gradients: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    early: dict[str, torch.Tensor] = field(default_factory=dict)
    optimized: set[str] = field(default_factory=set)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record every optimizer step."""
        original = MethodTrainer._get_grad_norm

        def record(trainer: MethodTrainer, model: Any, grad_norm: Any = None) -> Any:
            named = dict(trainer.model.named_parameters())
            found = {name: p.grad.detach().clone() for name, p in named.items() if p.grad is not None}
            self.gradients[trainer.total_step + 1] = found
            if trainer.total_step == EARLY:
                self.early = {name: p.detach().clone() for name, p in named.items() if p.requires_grad}
            owned = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
            self.optimized = {name for name, p in named.items() if id(p) in owned}
            return original(trainer, model, grad_norm)

        with patch.object(MethodTrainer, "_get_grad_norm", record):
            yield


class Bench:
    """The tiny models on disk, and the cases made so far."""

    def __init__(self, root: Path):
        self.root = root
        self.case = cache(lambda method, model: Case(self, method, model))
        self.section = cache(self._section)
        self._loaded = cache(self._load)
        self.answers = cache(lambda model: probe_logits(self.base(model), PROBE))
        self.fingerprint = cache(lambda model: base_fingerprint(self.section(model), self.base(model)))

    def base(self, model: str, dtype: str = "float32") -> Any:
        """Return a copy of a tiny model as it is loaded from disk."""
        return copy.deepcopy(self._loaded(model, dtype))

    def _load(self, model: str, dtype: str) -> Any:
        torch.manual_seed(0)  # of a classifier's head
        return load_model(self.section(model), dtype=dtype, device="cpu", head=head_of(model))

    def _section(self, model: str) -> ModelSection:
        folder = tiny.save_tiny(self.root / "models" / model, MODELS[model].make())
        return ModelSection(name_or_path=str(folder), task=MODELS[model].task, dtype="float32")


class Case:
    """A method on a tiny model; what is slow is done once, on first use."""

    def __init__(self, bench: Bench, name: str, model: str):
        self.bench, self.name, self.model = bench, name, model
        self.card = CARDS[name]
        self.trains = "trains" not in self.card.gates_off
        self.folder = bench.root / f"{name}-{model}"

    # -- configuration ---------------------------------------------------------------------------------------------

    @cached_property
    def recipe(self) -> Recipe:
        """The shipped recipe on the tiny model and one batch; no dropout and no clipping, so that runs compare."""
        shipped = peftctl.load_recipe(self.name)
        keys = shipped.method.model_dump() | OVERRIDES.get(self.name, {})
        keys |= {key: 0.0 for key in keys if key.endswith("dropout")}
        if isinstance(keys.get("target_modules"), list):
            names = RENAMED.get(self.model, {})
            keys["target_modules"] = [names.get(name, name) for name in keys["target_modules"]]
        if self.name in ONE_STAGE:
            tiny_model = MODELS[self.model]
            keys |= ONE_STAGE[self.name](self.folder / "earlier", shipped.method, tiny_model.task, tiny_model.make)
        train = {
            "output_dir": str(self.folder), "max_steps": 2 * HALF, "batch_size": 4, "gradient_accumulation": 1,
            "scheduler": "constant", "warmup_ratio": None, "warmup_steps": None, "weight_decay": 0.1,
            "max_grad_norm": 0.0, "logging_steps": 1, "save_steps": HALF, "save_total_limit": 99,
        }  # fmt: skip
        return shipped.model_copy(
            update={
                "model": self.bench.section(self.model),
                "quantization": QuantizationSection(),
                "method": type(shipped.method)(**keys),
                "data": shipped.data.model_copy(update={"labels": LABELS if head_of(self.model) else None}),
                "train": shipped.train.model_copy(update=train),
            }
        )

    def recipe_with(self, section: str, **keys: Any) -> Recipe:
        """Return the case's recipe with keys of a section changed."""
        return self.recipe.model_copy(update={section: getattr(self.recipe, section).model_copy(update=keys)})

    def method(self) -> Method:
        """Return the configured method, new."""
        return registry.get(self.name)(self.recipe.method)

    def base(self, dtype: str = "float32") -> Any:
        """Return a new base in the type that the method trains it in."""
        return self.bench.base(self.model, self.method().load_options().dtype or dtype)

    def meta(self) -> Any:
        """Return the base without weights."""
        return meta_model(as_trained(self.recipe, self.method()), head=head_of(self.model))

    def apply(self, method: Method, base: Any) -> Any:
        """Apply a method with the run's seed."""
        torch.manual_seed(0)
        return method.apply(base, Context(self.recipe, self.tokenizer))

    def start(self, method: Method, base: Any) -> Any:
        """Apply and calibrate a method, as a new run does."""
        model = self.apply(method, base)
        if self.trains:
            collate = self.collate(method)
            method.calibrate(model, (collate([row]) for row in MODELS[self.model].rows()))
        return model

    def rows(self) -> list[EncodedRow]:
        """Return the tiny model's rows, dealt to the sources of the shipped recipe where it has several."""
        rows, sources = MODELS[self.model].rows(), len(self.recipe.data.sources or ())
        return [replace(row, source=i % sources) for i, row in enumerate(rows)] if sources > 1 else rows

    def collate(self, method: Method) -> Collator:
        """Return what makes batches of rows, with the fields that the method asks for."""
        return Collator(self.tokenizer, None, method.fields())

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer with the method's changes."""
        tokenizer = copy.deepcopy(tiny.tiny_tokenizer())
        turns = [[Message("user", f"answer with {i}"), Message("assistant", str(i))] for i in range(8)]
        examples = [Example(where=f"rows:{i}", messages=turn) for i, turn in enumerate(turns)]
        self.method().prepare_tokenizer(tokenizer, examples, self.recipe)
        return tokenizer

    # -- runs ------------------------------------------------------------------------------------------------------

    def train(
        self, method: Method, model: Any, recipe: Recipe, name: str, checkpoint: Path | None = None, stop: int = 0
    ) -> tuple[Recorder, RunDir]:
        """Train an applied and calibrated method in a run directory of its own, as commands/train does.

        Args:
            method: As applied.
            model: What `apply` returned.
            recipe: What to train.
            name: Of the run directory.
            checkpoint: To go on from.
            stop: The step after which a signal stops the run; 0 for none.
        """
        run, rows, collate = self.run(recipe, name), self.rows(), self.collate(method)
        work = Workload(recipe, method, rows, [], collate, run, StopAt(stop) if stop else Reporter())
        recorder = Recorder()
        with recorder.watching(), pytest.raises(Interrupted) if stop else nullcontext():
            run_stages(work, model, checkpoint)
        return recorder, run

    def run(self, recipe: Recipe, name: str) -> RunDir:
        """Return a run directory that holds the recipe."""
        run = RunDir(self.folder / name)
        run.prepare(fresh=False, resume=True)
        run.write_text(run.recipe, dump_recipe(recipe, unread=self.method().unread))
        return run

    @cached_property
    def straight(self) -> Straight:
        """The straight run, its model as training left it, and its artefact, written as commands/train does."""
        method, base = self.method(), self.base()
        own = {name: (p, p.detach().clone()) for name, p in base.named_parameters()}
        model = self.start(method, base)
        initial = everything(model)
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        if self.trains:
            seen, run = self.train(method, model, self.recipe, "straight")
        else:
            seen, run = Recorder(), self.run(self.recipe, "straight")
        final, kept = everything(model), {id(p) for p in model.parameters()}
        moved = {n for n, (p, old) in own.items() if not torch.equal(p, old)}
        own_names = {id(p): n for n, (p, _) in own.items()}
        training = {own_names[id(p)] for p in model.parameters() if p.requires_grad and id(p) in own_names}
        model.eval()
        off = disabled_logits(model, self.card)
        if method.autocast:
            cast_weights(model, torch.float32)
        exported = method.export(model)
        return Straight(
            initial=initial,
            final=final,
            trainable=trainable,
            base_moved=moved - training,
            base_lost={name for name, (p, _) in own.items() if id(p) not in kept},
            seen=seen,
            run=run,
            off=off,
            saved=self._save(exported, model, run),
        )

    def _save(self, exported: Any, model: Any, run: RunDir) -> Saved:
        keys = None
        if isinstance(exported, PeftModel):
            keys = set(get_peft_model_state_dict(exported, save_embedding_layers=False))
        logits = probe_logits(model if exported is None else exported, PROBE)
        off = disabled_logits(exported, self.card)
        info = ArtifactInfo(self.name, self.card, self.recipe, self.bench.fingerprint(self.model))
        return Saved(save.save_artifact(exported, self.tokenizer, run, info), keys, logits, off)

    def continued(self, name: str, recipe: Recipe, watch: Callable[[Any], None] = lambda model: None) -> Continued:
        """Train one step from the straight run's early checkpoint, where weights are equal to its own."""
        method = self.method()
        model = self.apply(method, self.base())
        watch(model)
        seen, run = self.train(method, model, recipe, name, self.straight.checkpoint, stop=HALF + 1)
        return Continued(seen.gradients[HALF + 1], read_mark(run.latest_checkpoint()).supervised_tokens)


def everything(model: Any) -> dict[str, torch.Tensor]:
    """Return a copy of every parameter and buffer of a model, by name."""
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def disabled_logits(model: Any, card: Card) -> torch.Tensor | None:
    """Return the logits of a PeftModel whose adapter is switched off; None where it can't be, as the card may say."""
    if not isinstance(model, PeftModel):
        return None
    try:
        with model.disable_adapter():
            return probe_logits(model, PROBE)
    except Exception:
        if not card.disable_note:
            raise
        return None


def same(found: torch.Tensor, expected: torch.Tensor, share: float = 1e-5) -> bool:
    """Tell whether two tensors agree up to a share of the larger one's largest value."""
    return found.shape == expected.shape and bool((found - expected).abs().max() <= share * expected.abs().max())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder's safetensors files."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
