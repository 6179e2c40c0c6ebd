"""What the tests of methods that restart share."""

import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import torch

from peftctl.methods.base import StepInfo
from peftctl.training.trainer import MethodTrainer
from peftctl.tuners.fixed_factors import layers


def held(model):
    """Return the rank that is fixed beside every layer, which must be the same."""
    (rank,) = {0 if layer.fixed_factors is None else len(layer.fixed_factors.E) for _, layer in layers(model)}
    return rank


def after_step(method, model, step, total=100, optimizer=None):
    """Let a method do what it does after a step of a run."""
    state = {} if optimizer is None else optimizer.state
    info = StepInfo(step, total, model, lambda forgotten: [state.pop(p, None) for p in forgotten])
    for callback in method.callbacks(model):
        callback.after_step(info)
    return info


def change_ranks(merged, base):
    """Return the ranks of W - W_0 of the projections of two Llamas."""
    pairs = zip(merged.named_parameters(), base.named_parameters(), strict=True)
    changes = [(w - old).double() for (name, w), (_, old) in pairs if "proj" in name]
    return {int(torch.linalg.matrix_rank(change, tol=2e-6)) for change in changes}


def lines_of(work):
    """Return the metrics of a run."""
    return [json.loads(line) for line in work.run.metrics.read_text().splitlines()]


def rates_of(work):
    """Return the learning rate of every step, from the first."""
    return [line["learning_rate"] for line in lines_of(work) if "learning_rate" in line]


@dataclass
class Seen:
    """What a run is about to do at each step: tensors with state in the optimizer, layers whose B is zero."""

    states: dict[int, int] = field(default_factory=dict)
    zero: dict[int, set[bool]] = field(default_factory=dict)

    @contextmanager
    def watching(self):
        """Record every step."""
        original = MethodTrainer._get_grad_norm

        def record(trainer, model, grad_norm=None):
            step = trainer.total_step
            self.states[step] = len(trainer.optimizer.state)
            self.zero[step] = {not bool(layer.lora_B["default"].weight.any()) for _, layer in layers(trainer.model)}
            return original(trainer, model, grad_norm)

        with patch.object(MethodTrainer, "_get_grad_norm", record):
            yield self
