"""The result of a method that trains several tasks: one adapter, and the values that each task has in some tensors.

All tasks have the same tensors by name and shape, so a model becomes another task's by copying values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

_PLACE = "peftctl_tasks"


@dataclass(frozen=True)
class TaskTensors:
    """What differs between tasks.

    Args:
        default: The task whose adapter is taken where none is named.
        tensors: Task -> name of a parameter in the model -> its value, in the order of the tasks.
    """

    default: str
    tensors: Mapping[str, Mapping[str, torch.Tensor]]


def set_tasks(model: Any, default: str, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Say what the tasks of a PeftModel are, and turn it into the default one's, in place."""
    setattr(model, _PLACE, TaskTensors(default, tensors))
    become(model, default)


def tasks_of(model: Any) -> TaskTensors | None:
    """Return the tasks of what a method exported; None where it has no tasks of its own."""
    return getattr(model, _PLACE, None)


def become(model: Any, task: str) -> None:
    """Give a model the tensors of one of its tasks, in place."""
    found = tasks_of(model)
    assert found is not None
    for name, value in found.tensors[task].items():
        model.get_parameter(name).data.copy_(value)
