"""`peftctl check` and `train --dry-run`: what a run would do, before it costs anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peftctl.backends import device as devices
from peftctl.commands.planning import Advice, advise, plan
from peftctl.commands.prepare import Prepared, prepare
from peftctl.data.encode import EncodedRow
from peftctl.data.preview import preview
from peftctl.data.supervision import SupervisionReport
from peftctl.errors import UsageError
from peftctl.models.load import STAND_IN_TOKENIZER, stand_in
from peftctl.recipe.schema import Recipe
from peftctl.recipe.write import dump_recipe
from peftctl.training.memory import Machine, MemoryPlan, parse_bytes
from peftctl.training.stages import stage_steps


@dataclass(frozen=True)
class CheckReport:
    """What was found.

    Args:
        recipe_yaml: The resolved recipe.
        trainable: Trainable parameters.
        total: Parameters of the base.
        steps: Optimizer steps of the main stage.
        plan: Memory of one process.
        processes: How many train together.
        available: Bytes that a process may have on its device, or None where unknown.
        advice: Where the plan does not fit: what would make it smaller, the largest effect first.
        supervision: Report of the training rows, and of the held-out rows.
        previews: Rows as (text, trained on?) pieces.
        rows: The same rows as token ids and mask; of an encoder-decoder what it reads and what it writes, of a
            classifier with its classes.
        notices: What the user should know.
    """

    recipe_yaml: str
    trainable: int
    total: int
    steps: int
    plan: MemoryPlan
    processes: int
    available: int | None
    advice: Sequence[Advice]
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

    @property
    def _title(self) -> str:
        each = f" of each of {self.processes} processes" if self.processes > 1 else ""
        return f"memory plan{each} on {self.plan.device}"

    @property
    def verdict(self) -> list[str]:
        """Return what to say of a plan that does not fit: a line, then one for each advice."""
        if self.available is None or self.fits:
            return []
        more = f"the plan takes {_gib(self.plan.total - self.available)} more than there is"
        if not self.advice:
            return [f"{more}; take a smaller model, or more memory"]
        lines = [f"{more}; what would help:"]
        enough = ["" if a.total > self.available else " (fits)" for a in self.advice]
        return lines + [f"  {a.change}: {_gib(a.total)}{note}" for a, note in zip(self.advice, enough, strict=True)]

    def tables(self) -> list[tuple[str, list[list[str]]]]:
        """Return titled rows to show."""
        plan = [[name, _gib(value)] for name, value in self.plan.parts.items() if value]
        plan.append(["total", _gib(self.plan.total)])
        if self.available is not None:
            left = self.available - self.plan.total
            plan.append(["available", _gib(self.available)])
            plan.append(["left" if left >= 0 else "missing", _gib(abs(left))])
        if self.plan.host:
            plan.append(["main memory", _gib(self.plan.host)])
        model = [
            ["parameters", f"{self.total:,}"],
            ["trainable", f"{self.trainable:,} ({self.trainable / self.total:.3%})"],
            ["optimizer steps", f"{self.steps:,}"],
        ]
        supervision = [(f"supervision of the {name} rows", report.lines()) for name, report in self.supervision.items()]
        return [*supervision, ("model", model), (self._title, plan)]


def check(
    recipe: Recipe,
    *,
    preview_rows: int = 3,
    device: str | None = None,
    memory: str | None = None,
    processes: int = 1,
) -> CheckReport:
    """Check a recipe against its model's shapes and its data.

    Args:
        recipe: The recipe.
        preview_rows: How many training rows to show.
        device: `cpu` or `cuda`: plan for that instead of this machine.
        memory: Memory of that device, e.g. `24GB`.
        processes: How many train together, each on a device of its own; on a CPU they share the memory.
    """
    if device not in (None, "cpu", "cuda"):
        raise UsageError(f"--device: expected cpu or cuda, got '{device}'")
    kind = device or devices.current_device().type
    total = parse_bytes(memory) if memory else devices.available_memory_bytes(kind)
    ready = prepare(recipe, allow_stand_in=True, device=kind, world_size=processes)
    recipe = ready.recipe
    machine = Machine(kind, processes, devices.current_memory_bytes() if kind == "cpu" else 0)
    planned = plan(ready, machine)
    available = total // processes if total is not None and kind == "cpu" else total
    advice = advise(ready, machine, planned, available) if available is not None and planned.total > available else []
    shown, stages = ready.train_rows[:preview_rows], ready.method.stages(recipe)
    supervision = {"training": ready.train_report}
    if ready.eval_report:
        supervision["held-out"] = ready.eval_report
    return CheckReport(
        recipe_yaml=dump_recipe(recipe, unread=ready.method.unread),
        trainable=ready.trainable,
        total=ready.total,
        steps=sum(stage_steps(stages, recipe, ready.train_rows, processes)) if ready.trainable else 0,
        plan=planned,
        processes=processes,
        available=available,
        advice=advice,
        supervision=supervision,
        previews=[preview(row, ready.tokenizer, recipe.data.labels or ()) for row in shown],
        rows=[_tokens(row) for row in shown],
        notices=_notices(ready, planned),
    )


def _notices(ready: Prepared, planned: MemoryPlan) -> list[str]:
    notices = [*ready.notices, *ready.train_report.warnings()]
    if not planned.traced:
        notices.append("activations are estimated from the model's widths, as its code can't be run without weights")
    if shape := stand_in(ready.recipe.model):
        reason = "is Python code that comes with the model" if shape.remote_code else "is not on this machine"
        notices.append(
            f"lengths are counted with the tokenizer of {STAND_IN_TOKENIZER}, "
            f"since that of {ready.recipe.model.name_or_path} {reason}"
        )
    return notices


def _tokens(row: EncodedRow) -> dict[str, Any]:
    if row.paired or row.classes:
        return {"input_ids": row.input_ids, "labels": row.labels}
    return {"input_ids": row.input_ids, "supervised": [label != -100 for label in row.labels]}


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
