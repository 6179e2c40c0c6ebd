"""Whole tensors out of a model that PyTorch's FSDP2 has divided, and back; accelerate divides it.

Every process holds a share of each tensor, a `DTensor`, and gathers a block at a time: what ZeRO-3 does, without
DeepSpeed. A checkpoint holds what one process would write. The functions that return or take tensors are collective.

FSDP: Zhao et al. 2023 (arXiv 2304.11277).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

SETTINGS = {"version": 2, "reshard_after_forward": True}
"""Of the library: blocks, as the model names them, are gathered for their forward and again for their backward pass."""


@contextmanager
def on_any_device() -> Iterator[None]:
    """Let accelerate divide a model on CPUs too: it offers that on accelerators alone, and PyTorch can do both."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    state = PartialState()
    before = state.distributed_type
    if before is DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU
    try:
        yield
    finally:
        state.distributed_type = before


def whole_tensors(owned: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the trained tensors in one piece, by name, on the CPU."""
    return {name: _whole(p.detach()) for name, p in owned.items()}


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """Return the state dict that the optimizer would have in one process."""
    content = optimizer.state_dict()
    state = {i: {key: _whole(value) for key, value in entry.items()} for i, entry in content["state"].items()}
    return {**content, "state": state}


def load_optimizer_state(optimizer: Any, saved: Mapping[str, Any]) -> None:
    """Divide a whole state, of any engine, among the processes."""
    from torch.distributed.tensor import distribute_tensor

    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def divided(value: Any, parameter: Any) -> Any:
        if not torch.is_tensor(value) or value.shape != parameter.shape:
            return value
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

    state = {i: {key: divided(v, parameters[i]) for key, v in entry.items()} for i, entry in saved["state"].items()}
    optimizer.load_state_dict({**saved, "state": state})


def leave() -> None:
    """Make the libraries forget it: another run of this process may take another engine."""
    os.environ.pop("ACCELERATE_USE_FSDP", None)


def _whole(value: Any) -> Any:
    from torch.distributed.tensor import DTensor

    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().cpu().clone() if torch.is_tensor(value) else value
