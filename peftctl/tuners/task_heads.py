"""A classifier with a head for each task while it learns several: a row is read by the head of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from peftctl.tuners.float32_copy import widen_copies


class TaskHeads(nn.Module):
    """Copies of a head; a head whose task has no row in a batch does not run, so that it gets no gradient.

    Args:
        head: Reads (batch, ...) and returns (batch, ...).
        tasks: How many.
        target: Whose head reads rows of no known task.
    """

    def __init__(self, head: nn.Module, tasks: int, target: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(copy.deepcopy(head) for _ in range(tasks))
        self.target = target
        self.task_ids: torch.Tensor | None = None

    def forward(self, states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the logits of a batch, each row's by the head of its task."""
        if self.task_ids is None:
            return self.heads[self.target](states, *args, **kwargs)
        tasks = torch.where(self.task_ids >= 0, self.task_ids, self.target).to(states.device)
        rows = [(tasks == task).nonzero()[:, 0] for task in range(len(self.heads))]
        logits = [head(states[own], *args, **kwargs) for head, own in zip(self.heads, rows, strict=True) if len(own)]
        return torch.cat(logits)[torch.cat(rows).argsort()]


def divide_heads(model: Any, tasks: int, target: int) -> None:
    """Give the tasks of a classifier, whose head peft trains, a head each, in place."""
    for wrapper in _wrappers(model):
        head = wrapper.modules_to_save["default"]
        vars(head).pop("forward", None)  # all heads together are cast below
        wrapper.modules_to_save["default"] = TaskHeads(head, tasks, target)
    widen_copies(model)


def heads_of(model: Any) -> list[TaskHeads]:
    """Return the heads of tasks; none where there is one for all."""
    found = (wrapper.modules_to_save["default"] for wrapper in _wrappers(model))
    return [module for module in found if isinstance(module, TaskHeads)]


def keep_targets_head(model: Any) -> None:
    """Leave a classifier the head of the target alone, in place."""
    for wrapper in _wrappers(model):
        heads: Any = wrapper.modules_to_save["default"]
        wrapper.modules_to_save["default"] = heads.heads[heads.target]
    widen_copies(model)


@contextmanager
def rows_of_tasks(model: Any, task_ids: torch.Tensor) -> Iterator[None]:
    """Let each row of a batch be read by the head of its task, (batch,)."""
    heads = heads_of(model)
    for module in heads:
        module.task_ids = task_ids
    try:
        yield
    finally:
        for module in heads:
            module.task_ids = None


def _wrappers(model: Any) -> list[ModulesToSaveWrapper]:
    return [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
