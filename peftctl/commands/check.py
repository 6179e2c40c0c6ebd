"""`peftctl check` and `train --dry-run`: what a run would do, before it costs anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peftctl.backends import device as devices
from peftctl.commands.prepare import Prepared, prepare
from peftctl.data.preview import preview
from peftctl.data.supervision import SupervisionReport
from peftctl.errors import UsageError
from peftctl.methods.base import Context
from peftctl.models.load import meta_model
from peftctl.recipe.schema import Recipe
from peftctl.recipe.write import dump_recipe
from peftctl.training.memory import MemoryPlan, parse_bytes, plan_memory
from peftctl.training.stages import total_steps


@dataclass(frozen=True)
class CheckReport:
    """What was found.

    Args:
        recipe_yaml: The resolved recipe.
        trainable: Trainable parameters.
        total: Parameters of the base.
        steps: Optimizer steps of the main stage.
        plan: Memory of one process.
        available: Bytes that the device has, or None where unknown.
        supervision: Report of the training rows, and of the held-out rows.
        previews: Rows as (text, trained on?) pieces.
        rows: The same rows as token ids and mask.
        notices: What the user should know.
    """

    recipe_yaml: str
    trainable: int
    total: int
    steps: int
    plan: MemoryPlan
    available: int | None
    supervision: dict[str, SupervisionReport]
    previews: Sequence[Sequence[tuple[str, bool]]]
    rows: Sequence[dict[str, Any]]
    notices: Sequence[str]

    @property
    def fits(self) -> bool | None:
        """Whether the plan fits the device; None where its memory is unknown."""
        return None if self.available is None else self.plan.total <= self.available

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self) | {"fits": self.fits, "memory_total": self.plan.total}

    def tables(self) -> list[tuple[str, list[list[str]]]]:
        """Return titled rows to show."""
        plan = [[name, _gib(value)] for name, value in asdict(self.plan).items() if value]
        plan.append(["total", _gib(self.plan.total)])
        if self.available is not None:
            plan.append(["available", _gib(self.available)])
        model = [
            ["parameters", f"{self.total:,}"],
            ["trainable", f"{self.trainable:,} ({self.trainable / self.total:.3%})"],
            ["optimizer steps", f"{self.steps:,}"],
        ]
        supervision = [(f"supervision of the {name} rows", report.lines()) for name, report in self.supervision.items()]
        return [*supervision, ("model", model), ("memory plan", plan)]


def check(
    recipe: Recipe, *, preview_rows: int = 3, device: str | None = None, memory: str | None = None
) -> CheckReport:
    """Check a recipe against its model's shapes and its data.

    Args:
        recipe: The recipe.
        preview_rows: How many training rows to show.
        device: `cpu` or `cuda`: plan for that instead of this machine.
        memory: Memory of that device, e.g. `24GB`.
    """
    if device not in (None, "cpu", "cuda"):
        raise UsageError(f"--device: expected cpu or cuda, got '{device}'")
    planned = device or devices.current_device().type
    in_process = devices.current_memory_bytes() if planned == "cpu" else 0
    ready = prepare(recipe)
    recipe = ready.recipe
    shown = ready.train_rows[:preview_rows]
    supervision = {"training": ready.train_report}
    if ready.eval_report:
        supervision["held-out"] = ready.eval_report
    return CheckReport(
        recipe_yaml=dump_recipe(recipe, unread=ready.method.unread),
        trainable=ready.trainable,
        total=ready.total,
        steps=total_steps(recipe, len(ready.train_rows)) if ready.trainable else 0,
        plan=_plan(ready, in_process),
        available=parse_bytes(memory) if memory else devices.available_memory_bytes(planned),
        supervision=supervision,
        previews=[preview(row, ready.tokenizer) for row in shown],
        rows=[{"input_ids": r.input_ids, "supervised": [label != -100 for label in r.labels]} for r in shown],
        notices=_notices(ready),
    )


def _plan(ready: Prepared, in_process: int) -> MemoryPlan:
    model = meta_model(ready.recipe.model)
    model = ready.method.apply(model, Context(ready.recipe))
    lengths = [len(row.input_ids) for row in ready.train_rows]
    supervised = [sum(label != -100 for label in row.labels) for row in ready.train_rows]
    return plan_memory(ready.recipe, model, lengths, supervised, process_bytes=in_process)


def _notices(ready: Prepared) -> list[str]:
    notices = list(ready.train_report.warnings())
    if ready.recipe.train.optimizer.startswith("paged") and devices.current_device().type == "cpu":
        notices.append("paged optimizers run unpaged on a CPU")
    return notices


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
