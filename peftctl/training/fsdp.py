"""A model that PyTorch's FSDP2 has divided; accelerate divides it.

Every process holds a share of each tensor, a `DTensor`, and gathers a block at a time: what ZeRO-3 does, without
DeepSpeed.

FSDP: Zhao et al. 2023 (arXiv 2304.11277).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from peftctl.training.engine import DividingEngine, saved_optimizer

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


class Fsdp(DividingEngine):
    """See `Engine`."""

    divides_weights = True

    def begin(self, trainer: Any) -> None:
        """Take the divided tensors, which stand in the places of the whole ones."""
        super().begin(trainer)
        self.model = trainer.model
        divided = dict(self.model.named_parameters())
        self.owned = {name: divided[name] for name in self.owned}

    def leave(self) -> None:
        """Make the libraries forget it, for another run of this process; the model stays divided."""
        os.environ.pop("ACCELERATE_USE_FSDP", None)

    def whole_tensors(self) -> dict[str, torch.Tensor]:
        """Return the trained tensors in one piece, by name, on the CPU."""
        return {name: _whole(p.detach()) for name, p in self.owned.items()}

    def optimizer_state(self) -> dict[str, Any]:
        """Return the state dict that the optimizer would have in one process."""
        content = self.optimizer.state_dict()
        state = {i: {key: _whole(value) for key, value in entry.items()} for i, entry in content["state"].items()}
        return {**content, "state": state}

    def load(self, folder: Path) -> None:
        """Divide the optimizer's state of a checkpoint; the weights were divided with the model."""
        saved = saved_optimizer(folder)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = {
            i: {key: _divided(value, parameters[i]) for key, value in entry.items()}
            for i, entry in saved["state"].items()
        }
        self.optimizer.load_state_dict({**saved, "state": state})

    def put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Divide whole values of tensors that train among the processes, by name."""
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.owned[name].copy_(_divided(tensor, self.owned[name]))

    def gradients(self) -> dict[str, torch.Tensor | None]:
        """Return the whole gradients by name, clipped where the step is taken."""
        return {name: _whole(p.grad, p.device) for name, p in self.owned.items()}

    def forget_named(self, names: set[str]) -> None:
        """Drop the optimizer's state of tensors that train."""
        for name in names:
            self.optimizer.state.pop(self.owned[name], None)


def _divided(value: Any, parameter: Any) -> Any:
    """Return this process's share of a value that has a parameter's shape; any other value as it is."""
    from torch.distributed.tensor import distribute_tensor

    if not torch.is_tensor(value) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def _whole(value: Any, device: Any = "cpu") -> Any:
    from torch.distributed.tensor import DTensor

    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().to(device, copy=True) if torch.is_tensor(value) else value
