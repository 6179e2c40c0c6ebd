"""Stop and go on: the result equals the uninterrupted run's, bit for bit."""

import json
import os
import signal

import pytest
import torch

from peftctl.console import Reporter
from peftctl.errors import ArtifactError, Interrupted
from tests.training.helpers import train, trained_tensors, workload


class StopAt(Reporter):
    """Sends a signal to this process when a step is finished."""

    def __init__(self, step, number=signal.SIGTERM):
        self.at, self.number = step, number

    def step(self, step, metrics=None):
        if metrics is None and step == self.at:
            os.kill(os.getpid(), self.number)


def losses(run):
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.parametrize(
    ("stop", "number"), [(1, signal.SIGTERM), (4, signal.SIGINT), (6, signal.SIGTERM), (9, signal.SIGTERM)]
)
def test_stopped_and_resumed_equals_straight(tmp_path, stop, number):
    """24 rows, batch 4: steps 6 and 12 end an epoch; dropout is on, so the random state matters."""
    straight = workload(tmp_path / "straight", max_steps=13, save_steps=5)
    model, totals = train(straight)
    stopped = workload(tmp_path / "stopped", max_steps=13, save_steps=5, reporter=StopAt(stop, number))
    with pytest.raises(Interrupted, match=rf"after step {stop}; .* --resume"):
        train(stopped)
    resumed = workload(tmp_path / "stopped", max_steps=13, save_steps=5)
    checkpoint = resumed.run.latest_checkpoint()
    assert checkpoint.name == f"checkpoint-{stop}"
    resumed.run.truncate_metrics(stop)
    again, totals_again = train(resumed, checkpoint)
    for name, tensor in trained_tensors(model).items():
        assert torch.equal(tensor, trained_tensors(again)[name]), name
    assert losses(resumed.run) == losses(straight.run)
    assert (totals.steps, totals.train_tokens, totals.supervised_tokens) == (
        totals_again.steps,
        totals_again.train_tokens,
        totals_again.supervised_tokens,
    )


@pytest.mark.parametrize("steps", [5, 6])  # within an epoch, and at its end
def test_a_run_that_was_killed_after_its_last_step_has_none_left(tmp_path, steps):
    work = workload(tmp_path, max_steps=steps, save_steps=steps)
    model, totals = train(work)
    assert work.run.latest_checkpoint().name == f"checkpoint-{steps}"
    again, totals_again = train(work, work.run.latest_checkpoint())
    for name, tensor in trained_tensors(model).items():
        assert torch.equal(tensor, trained_tensors(again)[name]), name
    assert totals.steps == totals_again.steps == steps and max(losses(work.run)) == steps


def test_accumulation_and_epoch_end_resume_too(tmp_path):
    settings = {"max_steps": None, "epochs": 2.0, "batch_size": 2, "gradient_accumulation": 3}
    model, _ = train(workload(tmp_path / "straight", **settings))
    with pytest.raises(Interrupted):
        train(workload(tmp_path / "stopped", **settings, reporter=StopAt(3)))
    resumed = workload(tmp_path / "stopped", **settings)
    again, _ = train(resumed, resumed.run.latest_checkpoint())
    assert all(torch.equal(t, trained_tensors(again)[n]) for n, t in trained_tensors(model).items())


def test_only_the_newest_checkpoints_are_kept_and_hold_no_frozen_weight(tmp_path):
    work = workload(tmp_path, max_steps=9, save_steps=2, save_total_limit=2)
    model, _ = train(work)
    kept = sorted(p.name for p in work.run.checkpoints.iterdir())
    assert kept == ["checkpoint-8", "checkpoint-9"]
    from safetensors.torch import load_file

    saved = load_file(work.run.checkpoints / "checkpoint-9" / "trainable.safetensors")
    assert saved.keys() == trained_tensors(model).keys()


def test_damaged_checkpoint_is_one_clear_error(tmp_path):
    work = workload(tmp_path, max_steps=4, save_steps=2)
    train(work)
    file = work.run.checkpoints / "checkpoint-4" / "trainable.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="checkpoint-4: the checkpoint is damaged"):
        train(work, work.run.latest_checkpoint())


def test_checkpoint_of_another_rank_is_refused(tmp_path):
    from peftctl.methods.lora import Config, Method

    work = workload(tmp_path, max_steps=2)
    train(work)
    other = workload(tmp_path, Method(Config(r=2, dropout=0.1, target_modules="all-linear")), max_steps=2)
    with pytest.raises(ArtifactError, match="holds tensors that this model does not have"):
        train(other, other.run.latest_checkpoint())
