"""Builds the optimizer: the method's groups or a default split, with every trainable tensor in exactly one group."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from peftctl.errors import RunError
from peftctl.methods._groups import apart, by_decay
from peftctl.methods.base import Method
from peftctl.recipe.schema import TrainSection

# Our names -> those of the library. Fused AdamW updates in place in one pass, on CPU as well.
LIBRARY_NAMES = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}


def build_optimizer(method: Method, model: nn.Module, args: TrainingArguments, train: TrainSection) -> Any:
    """Return the optimizer of every trainable tensor.

    Raises:
        RunError: A trainable tensor is in no group, in two, or a frozen one is in a group.
    """
    groups = method.param_groups(model, train) or by_decay(apart(model, ())[1], train)
    check_partition(model, groups)
    own = method.optimizer(groups)
    if own is not None:
        return own
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args)
    return optimizer_class(groups, **options)


def check_partition(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Raise a RunError unless the groups hold every trainable tensor once and nothing else."""
    held = Counter(id(p) for group in groups for p in group["params"])
    names = {id(p): name for name, p in model.named_parameters()}
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    faults = [f"{names[i]} is in no optimizer group" for i in trainable - held.keys()]
    faults += [f"{names.get(i, 'a foreign tensor')} does not train" for i in held.keys() - trainable]
    faults += [f"{names[i]} is in {n} optimizer groups" for i, n in held.items() if n > 1 and i in names]
    if faults:
        raise RunError("the method's parameter groups are wrong: " + "; ".join(sorted(faults)[:5]))


def optimized_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors that the optimizer owns, by the model's names."""
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name: p for name, p in model.named_parameters() if id(p) in owned}
