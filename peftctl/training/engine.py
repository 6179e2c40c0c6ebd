"""What a stage trains through: which process holds which part of weights, gradients and optimizer state.

`Engine` is one process, or several that each hold everything (DDP). `DividingEngine` is the base of those that divide
something: ZeRO (`zero.py`) and FSDP (`fsdp.py`). All give and take whole tensors, so a checkpoint of one is one of all.
Where several processes train, every one calls the methods that give or take tensors, at the same time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftctl.training.checkpoints import OPTIMIZER
from peftctl.training.optimizers import optimized_tensors


class Engine:
    """Everything whole.

    Args:
        model: What trains.
        optimizer: Over its trainable tensors, before the library wraps it.
    """

    divides_weights = False
    """Whether every process holds only a part of the weights."""

    def __init__(self, model: Any, optimizer: Any):
        self.model = model
        self.optimizer = optimizer
        self.owned: dict[str, Any] = optimized_tensors(optimizer, model)  # engines put attributes of their own on them

    def begin(self, trainer: Any) -> None:
        """Take what the library has made of model and optimizer."""
        self.optimizer = trainer.optimizer

    def leave(self) -> None:
        """Make the model an ordinary one again, and the libraries forget the engine."""

    def forward_ends(self) -> None:
        """Let the loss read the tensors that train, where the method does so."""

    def step(self) -> None:
        """Do what the library's `optimizer.step` does not."""

    def skip_step(self) -> None:
        """Leave the step at hand out: no optimizer moves a tensor without a gradient."""
        for parameter in self.owned.values():
            parameter.grad = None

    def whole_tensors(self) -> Mapping[str, torch.Tensor]:
        """Return the tensors that train, by name, in one piece each."""
        return self.owned

    def optimizer_state(self) -> dict[str, Any]:
        """Return the optimizer's state as one process would have it."""
        return self.optimizer.state_dict()

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint of any engine, whose tensors the model had when this engine began.

        Args:
            folder: The checkpoint.
        """
        self.optimizer.load_state_dict(saved_optimizer(folder))

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Let the model have whole tensors that train, with their whole gradients; changes of the tensors are kept."""
        yield

    def forget(self, parameters: Iterable[Any]) -> None:
        """Drop the optimizer's state of tensors of the model, which fill groups of the optimizer."""
        for parameter in parameters:
            self.optimizer.state.pop(parameter, None)


class DividingEngine(Engine):
    """Processes hold parts: of the optimizer's state at least."""

    def __init__(self, model: Any, optimizer: Any):
        super().__init__(model, optimizer)
        self._shown: dict[int, str] = {}  # while the model has whole tensors: their ids -> their names

    def put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Divide whole values of tensors that train among the processes, by name."""
        raise NotImplementedError

    def gradients(self) -> Mapping[str, torch.Tensor | None]:
        """Return the whole, clipped gradients of the step, by name."""
        raise NotImplementedError

    def forget_named(self, names: set[str]) -> None:
        """Drop the optimizer's state of tensors that train."""
        raise NotImplementedError

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Put whole tensors, with their gradients, in the places of the divided ones; keep changes of the tensors."""
        gradients = self.gradients()
        held, shown = {}, {}
        for name, tensor in self.whole_tensors().items():
            parent, _, key = name.rpartition(".")
            places = self.model.get_submodule(parent)._parameters
            held[name] = (places, key, places[key])
            shown[name] = nn.Parameter(tensor.to(places[key].device))
            shown[name].grad = gradients.get(name)
            places[key] = shown[name]
        before = {name: parameter.detach().clone() for name, parameter in shown.items()}
        self._shown = {id(parameter): name for name, parameter in shown.items()}
        try:
            yield
        finally:
            self._shown = {}
            for places, key, parameter in held.values():
                places[key] = parameter
        changed = {name: p.detach() for name, p in shown.items() if not torch.equal(p, before[name])}
        if changed:  # in every process or in none: all have computed the same
            self.put(changed)

    def forget(self, parameters: Iterable[Any]) -> None:
        """Drop the optimizer's state of tensors that the model has inside of `whole`."""
        self.forget_named({self._shown[id(parameter)] for parameter in parameters})


def saved_optimizer(folder: Path) -> dict[str, Any]:
    """Return the optimizer's state of a checkpoint, as one process would have it."""
    return torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
