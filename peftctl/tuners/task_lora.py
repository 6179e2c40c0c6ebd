"""A low-rank pair for each task beside the shared one of a LoRA layer, chosen row by row, and the adapter of each task.

    y_i = W x_i + s B A x_i + s B_t A_t x_i,   t the task of row i;   A_t: (r_t, d_in), B_t: (d_out, r_t)

The pairs are parameters of their own, and one whose task has no row in a batch takes no part in the forward pass: it
gets no gradient, not a gradient of zeros, so that no optimizer moves or decays it. For one task the layer is exactly a
stock LoRA of rank r + r_t, [A; A_t] and [B B_t], with the scale s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from peftctl.errors import RunError
from peftctl.tuners.fixed_factors import layers
from peftctl.tuners.task_tensors import set_tasks


class Routing:
    """The tasks of the batch at hand, which all layers of a model read; the last ones stay for recomputed layers.

    Args:
        groups: Task -> (its rows,), in the order of `order`; None where all rows are of the one task `alone`.
        order: (batch,), where each row stands among the rows put together group by group.
        alone: The task of all rows.
    """

    def __init__(self) -> None:
        self.groups: dict[int, torch.Tensor] | None = None
        self.order = torch.empty(0)
        self.alone = 0

    def set(self, task_ids: torch.Tensor | None) -> None:
        """Take the tasks of a batch, (batch,), counted from 0; rows of no task (-1), or no ids, are of the first."""
        ids = [0] if task_ids is None else [max(i, 0) for i in task_ids.tolist()]
        self.groups, self.alone = None, ids[0]
        if task_ids is None or len(set(ids)) == 1:
            return
        rows = {task: [i for i, other in enumerate(ids) if other == task] for task in sorted(set(ids))}
        self.groups = {task: torch.tensor(found, device=task_ids.device) for task, found in rows.items()}
        self.order = torch.cat(list(self.groups.values())).argsort()

    def follow(self, model: nn.Module) -> None:
        """Take `task_ids` out of every call of a model."""

        def note(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            self.set(kwargs.pop("task_ids", None))
            return args, kwargs

        self.hook = model.register_forward_pre_hook(note, with_kwargs=True)

    def leave(self) -> None:
        """Let the model's calls be as they were."""
        self.hook.remove()


class TaskFactors(nn.Module):
    """A_t, drawn Kaiming-uniform, and B_t, zero, of every task at one layer.

    They lie in this very module, not in lists below it: engines that divide weights gather what a module itself has
    when it is called.

    Args:
        tasks: How many there are.
        rank: r_t.
        d_in: Width of the layer's input.
        d_out: Width of its output.
        routing: Says which row is of which task.
        device: Where the tensors lie.
    """

    def __init__(self, tasks: int, rank: int, d_in: int, d_out: int, routing: Routing, device: torch.device):
        super().__init__()
        self.routing = routing
        for task in range(tasks):
            self.register_parameter(f"A_{task}", nn.Parameter(torch.empty(rank, d_in, device=device)))
            self.register_parameter(f"B_{task}", nn.Parameter(torch.zeros(d_out, rank, device=device)))
            nn.init.kaiming_uniform_(self.get_parameter(f"A_{task}"), a=math.sqrt(5))

    def pair(self, task: int) -> tuple[nn.Parameter, nn.Parameter]:
        """Return A_t and B_t."""
        return self.get_parameter(f"A_{task}"), self.get_parameter(f"B_{task}")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return B_t A_t x for x of shape (batch, seq, d_in) or (batch * seq, d_in), in the type of x."""
        groups = self.routing.groups
        if groups is None:
            return self._of(self.routing.alone, x)
        batch = len(self.routing.order)
        if x.shape[:-1].numel() % batch:
            raise RunError(
                f"a layer with task pairs read {x.shape[:-1].numel()} states of {batch} rows, so it can't be said "
                "which is of which task; name other layers in method.branch_points, or set train.batch_size=1"
            )
        rows = x.reshape(batch, -1, x.shape[-1])  # some architectures flatten rows before the feed-forward part
        parts = torch.cat([self._of(task, rows[found]) for task, found in groups.items()])
        return parts[self.routing.order].reshape(*x.shape[:-1], -1)

    def _of(self, task: int, x: torch.Tensor) -> torch.Tensor:
        a, b = self.pair(task)
        return functional.linear(functional.linear(x, a.to(x.dtype)), b.to(x.dtype))


class TaskTerm:
    """What a LoRA layer with task pairs computes."""

    task_factors: TaskFactors

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return W x + s B A x + s B_t A_t x for x of shape (..., d_in); without B A where the layer has none."""
        if self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        # As with any LoRA here: in training A and B are rounded to the type of x, and x is widened outside of it.
        read = self.lora_dropout["default"](x if self.training else x.to(self.task_factors.pair(0)[0].dtype))
        update = self.task_factors(read)
        if "default" in self.lora_A:
            a, b = self.lora_A["default"].weight.to(read.dtype), self.lora_B["default"].weight.to(read.dtype)
            update = update + functional.linear(functional.linear(read, a), b)
        return (result + update * self.scaling["default"]).to(result.dtype)


def add_task_factors(model: nn.Module, names: Sequence[str], tasks: int, rank: int, shared: bool) -> None:
    """Put a pair for every task beside the LoRA layers of these names, in place.

    Args:
        model: A PeftModel with one LoRA adapter whose layers train.
        names: Of the layers, as `layers` yields them.
        tasks: How many there are.
        rank: r_t.
        shared: Keep B A there; False leaves the pairs alone.
    """
    routing = Routing()
    chosen = set(names)
    for name, layer in layers(model):
        if name not in chosen:
            continue
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        layer.task_factors = TaskFactors(tasks, rank, a.shape[1], b.shape[0], routing, a.device)
        if not shared:
            del layer.lora_A["default"], layer.lora_B["default"]
        # peft makes its layers by their base's type and can't be told of another kind; ours has the same tensors.
        layer.__class__ = _with_tasks(type(layer))  # type: ignore[arg-type]  # mypy takes Module's hash for its type's
    routing.follow(model)


def task_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers with task pairs, with their names in the model."""
    return ((name, layer) for name, layer in layers(model) if isinstance(layer, TaskTerm))


def into_task_adapters(peft_model: Any, tasks: Sequence[str]) -> Any:
    """Turn every layer into a stock LoRA layer that is, at first, the first task's; keep what the others have there.

    Args:
        peft_model: With task pairs.
        tasks: Their names.
    """
    config = peft_model.peft_config["default"]
    tensors: dict[str, dict[str, torch.Tensor]] = {task: {} for task in tasks}
    inside = "base_model.model."
    for name, layer in list(task_layers(peft_model)):
        layer.task_factors.routing.leave()
        own = [_whole_pair(layer, i) for i in range(len(tasks))]
        for task, (down, up) in zip(tasks, own, strict=True):
            tensors[task] |= {f"{name}.lora_A.default.weight": down, f"{name}.lora_B.default.weight": up}
        down, up = own[0]
        rank, scale = len(down), layer.scaling["default"]
        layer.lora_A["default"], layer.lora_B["default"] = _linear(down), _linear(up)
        layer.r["default"], layer.lora_alpha["default"] = rank, scale * rank
        config.rank_pattern[name.removeprefix(inside)] = rank
        config.alpha_pattern[name.removeprefix(inside)] = scale * rank
        del layer.task_factors
        layer.__class__ = type(layer).__mro__[2]  # what `_with_tasks` was given
    set_tasks(peft_model, tasks[0], tensors)
    return peft_model


def _whole_pair(layer: Any, task: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [A; A_t]: (r + r_t, d_in) and [B B_t]: (d_out, r + r_t); the task's alone where nothing is shared."""
    a, b = (factor.detach() for factor in layer.task_factors.pair(task))
    if "default" not in layer.lora_A:
        return a.clone(), b.clone()
    shared_a, shared_b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    return torch.cat([shared_a, a]), torch.cat([shared_b, b], dim=1)


@cache
def _with_tasks(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Task{kind.__name__}", (TaskTerm, kind), {})


def _linear(weight: torch.Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight.clone())
    return made
