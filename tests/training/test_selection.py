"""The lowest held-out loss: which weights a run ends with, when it stops, and that a kill changes neither."""

import json
import shutil

import pytest
import torch

from peftctl.console import Reporter
from peftctl.errors import ArtifactError, Interrupted, RunError
from peftctl.evaluation.loss import held_out_loss
from peftctl.methods import lora
from peftctl.methods.base import Stage
from tests.training.helpers import train, trained_tensors, workload
from tests.training.test_resume import StopAt

# Held-out losses fall until step 5, with a small rise at step 3, then rise: three evaluations later it is step 8.
SETTINGS = {
    "max_steps": 14,
    "eval_steps": 1,
    "learning_rate": 3e-2,
    "scheduler": "constant",
    "save_steps": 100,
    "load_best": True,
    "early_stopping": 3,
}


class Said(Reporter):
    def __init__(self):
        self.lines = []

    def notice(self, text):
        self.lines.append(text)


def lines(run):
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def evaluations(run):
    return {line["step"]: line["eval_loss"] for line in lines(run) if "eval_loss" in line}


def kept(run):
    return [folder.name for folder in run.complete_checkpoints()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    work = workload(tmp_path_factory.mktemp("straight"), reporter=Said(), **SETTINGS)
    model, totals = train(work)
    return work, trained_tensors(model), totals, model


def test_the_run_ends_with_the_best_weights_and_says_so(straight):
    work, _, totals, model = straight
    losses = evaluations(work.run)
    assert list(losses) == [1, 2, 3, 4, 5, 6, 7, 8] and min(losses, key=losses.get) == 5
    assert losses[3] > losses[2]  # patience starts anew after a new lowest
    assert totals.steps == 8
    assert vars(totals.selected) == {
        "best_step": 5,
        "best_eval_loss": losses[5],
        "step_of_weights": 5,
        "stopped_early": True,
    }
    assert held_out_loss(model, work.eval_rows, work.collate, 8)["loss"] == losses[5]
    assert work.reporter.lines == [
        "stopped early after step 8: 3 held-out losses in a row without a new lowest one",
        f"took the weights of step 5, with the lowest held-out loss, {losses[5]:.4g}",
    ]


def test_each_evaluation_names_the_best_so_far(straight):
    found = [line for line in lines(straight[0].run) if "eval_loss" in line]
    assert [line["best_step"] for line in found] == [1, 2, 2, 4, 5, 5, 5, 5]
    assert [line["best_eval_loss"] for line in found] == [
        evaluations(straight[0].run)[line["best_step"]] for line in found
    ]
    assert [line.get("stopped_early", False) for line in found] == [False] * 7 + [True]


@pytest.mark.parametrize("stop", [3, 5, 8])
def test_a_kill_changes_neither_the_choice_nor_the_end(tmp_path, straight, stop):
    _, expected, totals, _ = straight
    with pytest.raises(Interrupted, match=f"after step {stop};"):
        train(workload(tmp_path, reporter=StopAt(stop), **SETTINGS))
    resumed = workload(tmp_path, **SETTINGS)
    resumed.run.truncate_metrics(stop)
    model, again = train(resumed, resumed.run.latest_checkpoint())
    assert (again.steps, again.selected) == (totals.steps, totals.selected)
    assert all(torch.equal(tensor, trained_tensors(model)[name]) for name, tensor in expected.items())
    assert evaluations(resumed.run) == evaluations(straight[0].run)


def test_a_run_that_lost_its_newest_checkpoint_goes_on_from_an_earlier_one(tmp_path, straight):
    with pytest.raises(Interrupted):
        train(workload(tmp_path, reporter=StopAt(6), **SETTINGS | {"save_steps": 3}))
    work = workload(tmp_path, **SETTINGS)
    assert kept(work.run) == ["checkpoint-5", "checkpoint-6"]
    shutil.rmtree(work.run.checkpoints / "checkpoint-6")
    model, again = train(work, work.run.latest_checkpoint())
    assert again.selected == straight[2].selected
    assert all(torch.equal(tensor, trained_tensors(model)[name]) for name, tensor in straight[1].items())


def test_the_best_of_every_kept_checkpoint_is_kept(tmp_path):
    settings = SETTINGS | {"save_steps": 1, "max_steps": 8, "early_stopping": None}
    with pytest.raises(Interrupted):
        train(workload(tmp_path, reporter=StopAt(4), save_total_limit=2, **settings))
    work = workload(tmp_path, save_total_limit=2, **settings)
    assert kept(work.run) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]  # the best of 3 is 2
    train(work, work.run.latest_checkpoint())
    assert kept(work.run) == ["checkpoint-5", "checkpoint-7", "checkpoint-8"]


@pytest.mark.parametrize("limit", [1, 3])
def test_without_load_best_only_the_newest_are_kept(tmp_path, limit):
    settings = SETTINGS | {"save_steps": 1, "load_best": False, "max_steps": 6}
    work = workload(tmp_path, save_total_limit=limit, **settings)
    model, totals = train(work)
    assert kept(work.run) == [f"checkpoint-{step}" for step in range(7 - limit, 7)]
    assert (totals.selected.best_step, totals.selected.step_of_weights) == (5, 6)
    assert not totals.selected.stopped_early
    assert held_out_loss(model, work.eval_rows, work.collate, 8)["loss"] == evaluations(work.run)[6]


def test_a_run_that_goes_on_never_lacks_a_complete_checkpoint(tmp_path):
    class Looks(Reporter):
        def step(self, step, metrics=None):
            seen.append(kept(resumed.run))

    settings = {"max_steps": 5, "save_steps": 2, "save_total_limit": 1}
    with pytest.raises(Interrupted):
        train(workload(tmp_path, reporter=StopAt(3), **settings))
    seen, resumed = [], workload(tmp_path, reporter=Looks(), **settings)
    train(resumed, resumed.run.latest_checkpoint())
    # Once at every step and once at its log line; each save comes after both.
    assert seen == [["checkpoint-3"]] * 2 + [["checkpoint-4"]] * 2
    assert kept(resumed.run) == ["checkpoint-5"]


def test_the_last_step_is_measured_too_and_is_no_early_stop(tmp_path):
    settings = SETTINGS | {"max_steps": 5, "eval_steps": 3, "early_stopping": 1}
    work = workload(tmp_path, **settings)
    _, totals = train(work)
    assert list(evaluations(work.run)) == [3, 5]
    assert totals.selected.best_step == 5 and not totals.selected.stopped_early
    assert kept(work.run) == ["checkpoint-3", "checkpoint-5"]


def test_a_run_without_either_key_says_nothing(tmp_path):
    work = workload(tmp_path, max_steps=2, eval_steps=1)
    _, totals = train(work)
    assert totals.selected is None
    assert not any("best_step" in line for line in lines(work.run))


class TwoStages(lora.Method):
    def stages(self, recipe):
        return (Stage("warm", steps=8), Stage("main"))


def test_only_the_main_stage_is_chosen_from(tmp_path):
    """The held-out loss rises at step 3 of the first stage, as above; that ends nothing, nor does the epoch at 6."""
    method = TwoStages(lora.Config(r=4, dropout=0.1, target_modules="all-linear"))
    work = workload(tmp_path, method, **SETTINGS | {"early_stopping": 1, "max_steps": 5})
    _, totals = train(work)
    losses = evaluations(work.run)
    warm = [line for line in lines(work.run) if line["stage"] == "warm" and "eval_loss" in line]
    assert [line["step"] for line in warm] == [*range(1, 9)] and losses[3] > losses[2]
    assert not any("best_step" in line for line in warm)
    main = {step: loss for step, loss in losses.items() if step > 8}
    assert totals.selected.best_step == min(main, key=main.get) > 8
    assert f"checkpoint-{totals.selected.best_step}" in kept(work.run)


def test_losses_that_are_not_finite_are_never_the_best(tmp_path, monkeypatch):
    monkeypatch.setattr("peftctl.training.trainer.held_out_loss", lambda *_, **__: {"loss": float("nan")})
    with pytest.raises(RunError, match=r"train.load_best: no held-out loss was finite; lower train.learning_rate"):
        train(workload(tmp_path, **SETTINGS | {"max_steps": 2}))
    assert all("best_step" not in line for line in lines(workload(tmp_path).run))


def test_a_best_checkpoint_that_is_gone_is_one_clear_error(tmp_path):
    class Deletes(Reporter):
        def step(self, step, metrics=None):
            if metrics is None and step == 8:
                shutil.rmtree(work.run.checkpoints / "checkpoint-5")

    work = workload(tmp_path, reporter=Deletes(), **SETTINGS)
    with pytest.raises(ArtifactError, match="checkpoint-5: the checkpoint is damaged"):
        train(work)
