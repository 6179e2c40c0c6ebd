"""The memory plan of a prepared recipe, on this machine or another, and what would make it smaller."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from peftctl.backends import device as devices
from peftctl.backends import processes
from peftctl.backends.heap import heap_limit
from peftctl.commands.prepare import Prepared, as_trained, attach_to_shapes, fit_rows, head_of
from peftctl.data.collate import Collator
from peftctl.data.table import sizes_of
from peftctl.errors import UsageError
from peftctl.models.load import meta_model
from peftctl.recipe.schema import Recipe
from peftctl.training.memory import Machine, MemoryPlan, plan_memory
from peftctl.training.passes import may_cut, pass_tokens

_WORTH = 0.01
"""Share of what the run itself adds that a change must save to be worth a line."""
_SHORTEST = 64
"""Tokens below which shorter rows are no advice."""
_HEAP = "MALLOC_MMAP_THRESHOLD_=131072 in the environment"


@dataclass(frozen=True)
class Advice:
    """A change of the recipe, and the plan's total after it."""

    change: str
    total: int


@dataclass(frozen=True)
class _Change:
    """One way to need less: key -> value, dotted, in the recipe's sections."""

    values: Mapping[str, Any]

    def apply(self, recipe: Recipe) -> Recipe:
        for path, value in self.values.items():
            section, key = path.split(".")
            changed = getattr(recipe, section).model_copy(update={key: value})
            recipe = recipe.model_copy(update={section: changed})
        return recipe

    def __str__(self) -> str:
        return " ".join(f"{path}={str(value).lower()}" for path, value in self.values.items())


def this_machine() -> Machine:
    """Return the device of this process, with the memory that it holds now, and how many train together."""
    return Machine(devices.current_device().type, processes.size(), devices.current_memory_bytes())


def plan(ready: Prepared, machine: Machine, recipe: Recipe | None = None) -> MemoryPlan:
    """Plan the memory of a run.

    Args:
        ready: The prepared recipe.
        machine: Where it is to run.
        recipe: A variation of it; left out, the recipe itself.

    Raises:
        UsageError: The DeepSpeed configuration can't be read, or the model's widths can't.
    """
    varied = recipe or ready.recipe
    model, rows = ready.applied, ready.train_rows
    if varied.model != ready.recipe.model:
        model = meta_model(as_trained(varied, ready.method), allow_stand_in=True, head=head_of(varied, ready.tokenizer))
        fit_rows(model, varied, ready.tokenizer)
        model = attach_to_shapes(varied, ready.method, model)[1]
    longest = varied.data.max_length
    if longest < ready.recipe.data.max_length:
        rows = [replace(row, input_ids=row.input_ids[:longest], labels=row.labels[:longest]) for row in rows]
    return plan_memory(
        varied, ready.method, model, rows, Collator(ready.tokenizer, varied.data.pad_to_multiple_of), machine
    )


def predict(ready: Prepared) -> int | None:
    """Return the peak that a run on this machine will measure; None for a model that can't be planned."""
    try:
        return plan(ready, this_machine()).measurable
    except UsageError:
        return None


def advise(ready: Prepared, machine: Machine, needed: MemoryPlan, available: int) -> list[Advice]:
    """Return what would lower a plan, the largest effect first; where no change alone is enough, several together.

    Args:
        ready: The prepared recipe.
        machine: Where it is to run.
        needed: Its plan there.
        available: Bytes that a process may have there.
    """
    found: list[tuple[_Change, int]] = []

    def total(recipe: Recipe) -> int:
        return plan(ready, machine, recipe).total

    for steps in _changes(ready, machine):
        for change in steps:  # ever stronger; the first that is enough
            size = total(change.apply(ready.recipe))
            if size <= available:
                break
        found.append((change, size))
    least = needed.total - _WORTH * (needed.total - needed.process)
    worth = sorted(((change, size) for change, size in found if size < least), key=lambda pair: pair[1])
    advice = [Advice(str(change), size) for change, size in worth]
    if needed.total - needed.allocator < least and heap_limit(spared=True):
        advice = sorted([*advice, Advice(_HEAP, needed.total - needed.allocator)], key=lambda a: a.total)
    if not any(a.total <= available for a in advice):
        advice += _together([change for change, _ in worth], ready.recipe, total, available)
    return advice


def out_of_memory(ready: Prepared) -> str:
    """Return what to change in a recipe that this machine was too small for, by its plan."""
    machine = this_machine()
    needed = plan(ready, machine)
    # What the device has in all is not all free; a change must lower the plan to help in any case.
    available = min(devices.available_memory_bytes(machine.kind) or needed.total, needed.total - 1)
    ways = [f"{way.change} (plan {way.total / 2**30:.2f} GiB)" for way in advise(ready, machine, needed, available)[:5]]
    lines = ways or ["nothing in the recipe would lower it"]
    return "\n  ".join(
        [f"out of device memory; the plan is {needed.total / 2**30:.2f} GiB, lower it by one of", *lines]
    )


def _together(
    changes: list[_Change], recipe: Recipe, total: Callable[[Recipe], int], available: int
) -> Iterator[Advice]:
    """Yield the fewest of the largest changes that are enough together, or all of them."""
    names: list[str] = []
    for change in changes:
        recipe = change.apply(recipe)
        names.append(str(change))
        size = total(recipe)
        if len(names) > 1 and (size <= available or change is changes[-1]):
            yield Advice(" ".join(names), size)
            return


def _changes(ready: Prepared, machine: Machine) -> Iterator[list[_Change]]:
    """Yield the ways to need less that this recipe leaves, each as ever stronger changes."""
    recipe, supports = ready.recipe, ready.method.card.supports
    train = recipe.train
    if not train.gradient_checkpointing and "gradient_checkpointing" in supports:
        yield [_Change({"train.gradient_checkpointing": True})]
    if recipe.quantization.bits != 4 and "4bit" in supports:
        yield [_Change({"quantization.bits": 4})]
    longest = max(size.inputs for size in sizes_of(ready.train_rows))
    if may_cut(recipe, ready.method):
        whole = train.batch_size * longest
        tokens = min(whole, pass_tokens(recipe, ready.method, machine.kind) or whole)
        fewer = [tokens >> i for i in range(1, tokens.bit_length()) if tokens >> i > longest]
        if tokens > longest:  # a row goes through whole
            yield [_Change({"train.tokens_per_pass": n}) for n in (*fewer, longest)]
    elif train.batch_size > 1:
        sizes = [train.batch_size >> i for i in range(1, train.batch_size.bit_length())]
        # as many rows a step as before
        rows = train.batch_size * train.gradient_accumulation
        yield [_Change({"train.batch_size": n, "train.gradient_accumulation": rows // n}) for n in sizes]
    if recipe.model.dtype == "float32" and not ready.method.load_options().dtype:
        yield [_Change({"model.dtype": "bfloat16"})]
    if train.optimizer in ("adamw", "paged_adamw_32bit"):
        paged = "paged_" if machine.kind == "cuda" else ""
        yield [_Change({"train.optimizer": f"{paged}adamw_8bit"})]
    longest = min(recipe.data.max_length, longest)
    if longest >= 2 * _SHORTEST:
        halves = [longest >> i for i in range(1, longest.bit_length()) if longest >> i >= _SHORTEST]
        yield [_Change({"data.max_length": n}) for n in halves]
