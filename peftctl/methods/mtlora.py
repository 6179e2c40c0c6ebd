"""MTLoRA: Agiza et al. 2024 (https://arxiv.org/abs/2403.20320).

    y_i = W x_i + b + s B A x_i                      where nothing branches
    y_i = W x_i + b + s B A x_i + s B_t A_t x_i      at branch points (mode matrixv2), t the task of row i
    y_i = W x_i + b + s B_t A_t x_i                  at branch points (mode matrix)
    A: (r, d_in), B: (d_out, r) of all tasks;   A_t: (r_t, d_in), B_t: (d_out, r_t) of task t

W and b stay frozen. Every source of `data.sources` is a task, in their order; rows of all tasks share batches, and the
pairs of a task without a row in a batch get no gradient, so nothing moves them, weight decay neither. The loss is
sum_t w_t L_t, where L_t is the sum over the supervised tokens of task t; the trainer divides it by those of all tasks.
s is constant, not alpha / r, as in the authors' code (4.0 in its configurations). A is Kaiming-uniform, B zero.

The paper adapts a Swin encoder in which streams of features of all tasks leave a shared one at the last block of each
stage, for decoders of their own. A language model has no stages and one stream, in which each row is of one task: here
tasks branch at the last block of each of four equal segments of depth, and further blocks read what the branched ones
made. In mode `matrix` the shared pair of a branch point would have no reader, so there is none. A classifier's head is
shared. Not offered: mode `addition`, and the unfrozen parts of the vision encoder (patch embedding, norms, biases).

The result is an ordinary LoRA adapter for each task, [B B_t] and [A; A_t] of rank r + r_t at branch points: the first
task's in adapter/, the others' in adapter/TASK/. Held-out rows of `data.eval` belong to no source: they are measured
with the first task. While it trains (`train.eval_steps`), rows that `data.eval_fraction` held out are measured with
their own task; before and after, and by `peftctl eval`, with the adapter that was asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from peftctl.errors import UsageError
from peftctl.methods import _tasks, base
from peftctl.methods._lora import LoraKeys, LoraMethod, refuse_embeddings
from peftctl.methods._selection import Layer, Selection
from peftctl.methods._targets import matched_modules, suffixes
from peftctl.recipe.schema import Positive

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PreTrainedModel

    from peftctl.models.supervised import Supervised

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class Config(LoraKeys):
    """The `method:` section of MTLoRA."""

    name: Literal["mtlora"] = "mtlora"
    tasks: list[str] = Field(min_length=1)
    """Names of the tasks, one for each of `data.sources`, in their order; `peftctl.load(run, task=name)` gives each."""
    r: Positive = 16
    """Rank of the pair that all tasks share."""
    task_r: Positive = 4
    """r_t: rank of each task's own pair at a branch point."""
    scale: Annotated[float, Field(gt=0)] = 4.0
    """s: the updates are multiplied by it, whatever their ranks."""
    mode: Literal["matrixv2", "matrix"] = "matrixv2"
    """What a branch point adds: the shared pair and the task's, or the task's alone."""
    branch_points: Positive | list[str] = 4
    """Where tasks have pairs of their own: in the last block of each of so many equal segments of depth; or the targets
    that these names select, as in target_modules."""
    task_weights: list[Annotated[float, Field(gt=0)]] = Field(default_factory=list)
    """w: what each task's loss is multiplied by; left out, 1."""
    # The scale is constant and the ranks are those above.
    alpha: ClassVar[float] = 1.0  # type: ignore[misc]
    init: ClassVar[str] = "kaiming"  # type: ignore[misc,assignment]
    rank_pattern: ClassVar[Mapping[str, int]] = {}  # type: ignore[misc,assignment]
    alpha_pattern: ClassVar[Mapping[str, float]] = {}  # type: ignore[misc,assignment]
    parts: ClassVar[Sequence[str]] = ()  # type: ignore[misc,assignment]

    @field_validator("tasks")
    @classmethod
    def _can_name_folders(cls, value: list[str]) -> list[str]:
        for name in value:
            if not _NAME.fullmatch(name):
                raise ValueError(f"expected letters, digits, - and _ in a task's name, got {name!r}; rename it")
        if len({name.lower() for name in value}) < len(value):
            raise ValueError("two tasks have the same name; rename one")
        return value

    @field_validator("task_weights")
    @classmethod
    def _one_for_each_task(cls, value: list[float], info: ValidationInfo) -> list[float]:
        tasks = info.data.get("tasks", [])
        if value and tasks and len(value) != len(tasks):
            raise ValueError(f"expected {len(tasks)}, one for each of method.tasks, got {len(value)}; correct it")
        return value

    @field_validator("init_from")
    @classmethod
    def _starts_anew(cls, value: str | None) -> str | None:
        if value is not None:
            raise ValueError(
                "a finished adapter holds the shared and a task's pair as one; go on from it with method.name: lora, "
                "or name it in model.adapters, which merges it first"
            )
        return value


class Method(LoraMethod):
    """LoRA that all tasks share, and small pairs of each task's own at branch points."""

    config: Config
    Config = Config
    leaves_out = True  # tasks without a row
    card = base.Card(
        title="MTLoRA",
        paper="Agiza et al. 2024, arXiv 2403.20320",
        category="lora",
        summary="Several tasks in one run: a LoRA that all share, and at branch points a small one of each task's own; "
        "saved as one ordinary LoRA adapter a task.",
        trains="A and B of every target, A_t and B_t of every task at branch points",
        count="r * (d_in + d_out) over targets + T * r_t * (d_in + d_out) over branch points, T tasks",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        mergeable=True,
        merge_note="merges one task: the first, or that of the folder adapter/TASK",
        supports=frozenset({"4bit", "8bit", "gradient_checkpointing", "resume", "new_tokens"}),
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return what LoRA trains, plus T * r_t * (d_in + d_out) over branch points; see `mode` for the shared part."""
        selection = self._select(model)
        branches = [selection.layers[name] for name in self._branches(model, selection)]
        own = sum(Layer(layer.module, self.config.task_r, None).count() for layer in branches)
        unread = sum(layer.count() for layer in branches) if self.config.mode == "matrix" else 0
        return selection.count(len(self.new_token_ids)) + len(self.config.tasks) * own - unread

    def notices(self, model: PreTrainedModel) -> list[str]:
        """Return where tasks branch, and what becomes of them."""
        tasks, lines = self.config.tasks, super().notices(model)
        branches = suffixes(model, self._branches(model, self._select(model)))
        shown = ", ".join(branches[:4]) + (f" and {len(branches) - 4} more" if len(branches) > 4 else "")
        lines.append(f"{len(tasks)} tasks ({', '.join(tasks)}) branch at: {shown}")
        if len(tasks) > 1:
            lines.append(
                f"adapter/ will hold task {tasks[0]}, which held-out rows are measured with before and after training, "
                f"and adapter/{tasks[1]}{' and so on' if tasks[2:] else ''} the {'others' if tasks[2:] else 'other'}"
            )
        return lines

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Attach the shared pairs to the targets, and those of the tasks at branch points.

        Raises:
            UsageError: `tasks` does not name one task for each source.
        """
        from peftctl.tuners.task_lora import add_task_factors

        _tasks.refuse_other_number(len(self.config.tasks), context.recipe.data)
        branches = self._branches(model, self._select(model))
        peft_model = super().apply(model, context)
        names = [f"base_model.model.{name}" for name in branches]
        keys = self.config
        add_task_factors(peft_model, names, len(keys.tasks), keys.task_r, shared=keys.mode == "matrixv2")
        return peft_model

    def fields(self) -> Sequence[str]:
        """Return the task of each row."""
        return ("task_ids",)

    def loss(
        self, model: Any, batch: Mapping[str, torch.Tensor], forward: Callable[..., Supervised]
    ) -> dict[str, torch.Tensor]:
        """Return sum_t w_t L_t, where L_t is the sum of cross-entropies over the supervised tokens of task t."""
        from dataclasses import replace

        import torch

        from peftctl.models.supervised import count_supervised

        found, weights = forward(batch), self.config.task_weights
        if len(set(weights)) <= 1:
            return {"loss": found.cross_entropy() * (weights[0] if weights else 1.0)}
        counts = torch.tensor([count_supervised(model, row[None]) for row in batch["labels"]])
        tasks = batch["task_ids"].cpu().clamp(min=0).repeat_interleave(counts)
        total = found.cross_entropy() * 0.0  # keeps a graph where no row has a token
        for task in tasks.unique().tolist():
            own = (tasks == task).nonzero()[:, 0].to(found.logits.device)
            part = replace(found, logits=found.logits[own], labels=found.labels[own])
            total = total + weights[task] * part.cross_entropy()
        return {"loss": total}

    def export(self, model: Any) -> Any:
        """Return the first task's adapter, an ordinary LoRA, with what the others have in its place."""
        from peftctl.tuners.task_lora import into_task_adapters

        return into_task_adapters(super().export(model), self.config.tasks)

    def _select(self, model: PreTrainedModel) -> Selection:
        return refuse_embeddings(super()._select(model), self.config.name)

    def _peft_config(self, model: PreTrainedModel, selection: Selection, context: base.Context) -> LoraConfig:
        config = super()._peft_config(model, selection, context)
        config.lora_alpha = self.config.scale * self.config.r  # type: ignore[assignment]  # peft divides by r
        return config

    def _branches(self, model: PreTrainedModel, selection: Selection) -> list[str]:
        """Return the targets at which tasks branch.

        Raises:
            UsageError: There is none, or a name is not among the targets.
        """
        points = self.config.branch_points
        if isinstance(points, int):
            found = [name for name in selection.layers if _ends_segment(model, name, points)]
        else:
            found = list(matched_modules(model, points))
            if outside := [name for name in found if name not in selection.layers]:
                raise UsageError(
                    f"method.branch_points: {outside[0]} is not among the targets; add it to method.target_modules, or "
                    "leave it out"
                )
        if not found:
            raise UsageError(
                "method.branch_points: no target lies in the last block of a segment; name targets to branch at"
            )
        return found


def _ends_segment(model: PreTrainedModel, name: str, segments: int) -> bool:
    """Tell whether a layer lies in the last block of one of the equal segments of its outermost list of blocks."""
    from torch import nn

    parts = name.split(".")
    for depth in range(1, len(parts)):
        blocks = model.get_submodule(".".join(parts[:depth]))
        if isinstance(blocks, nn.ModuleList):
            last = {-(-len(blocks) * (i + 1) // segments) - 1 for i in range(segments)}
            return int(parts[depth]) in last
    return False
