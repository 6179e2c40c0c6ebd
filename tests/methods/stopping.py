"""A signal in a chosen stage of a run, for methods with several."""

import os
import signal

import pytest
import torch

from peftctl.console import Reporter
from peftctl.errors import Interrupted
from tests.training.helpers import train, trained_tensors, workload


class StopIn(Reporter):
    """Sends a signal to this process when a step of a stage is finished."""

    def __init__(self, stage, step):
        self.stage, self.at, self.here = stage, step, None

    def begin(self, stage, steps, done):
        self.here = stage

    def step(self, step, metrics=None):
        if metrics is None and (self.here, step) == (self.stage, self.at):
            os.kill(os.getpid(), signal.SIGTERM)


def stopped_equals_straight(folder, make, stage, step, **settings):
    """Assert that a run that is stopped in a stage and goes on ends as one that never stopped, bit for bit.

    Args:
        folder: For both runs.
        make: Returns the configured method, new.
        stage: Its name.
        step: Of the stage.
        settings: Keys of the recipe's `train:` section.
    """
    first, last = make(), make()
    straight, totals = _train(workload(folder / "straight", first, **settings))
    with pytest.raises(Interrupted):
        _train(workload(folder / "stopped", make(), reporter=StopIn(stage, step), **settings))
    resumed = workload(folder / "stopped", last, **settings)
    again, totals_again = train(resumed, resumed.run.latest_checkpoint())
    assert totals.steps == totals_again.steps
    expected, found = trained_tensors(straight), trained_tensors(again)
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []
    one, other = dict(straight.named_buffers()), dict(again.named_buffers())
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert again.peft_config["default"].to_dict() == straight.peft_config["default"].to_dict()


def _train(work):
    """Train as `commands/train` does: with calibration, from the beginning."""
    from peftctl.training.stages import run_stages
    from tests.methods.helpers import applied
    from tests.tiny import tiny_llama

    model = applied(work.method, tiny_llama())
    work.method.calibrate(model, (work.collate([row]) for row in work.train_rows))
    return model, run_stages(work, model, None)
