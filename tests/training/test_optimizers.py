"""Every optimizer of the schema: it learns, decays, takes our learning rate, and goes on bit for bit after a kill."""

from typing import get_args

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from peftctl.errors import Interrupted
from peftctl.methods import full
from peftctl.recipe.schema import Optimizer, TrainSection
from peftctl.training.optimizers import LIBRARY_NAMES, build_optimizer
from tests.training.helpers import train, trained_tensors, workload
from tests.training.test_resume import StopAt, losses

NAMES = get_args(Optimizer)
RATES = dict.fromkeys(NAMES, 1e-2) | {"sgd": 0.5}
BITS_8 = [name for name in NAMES if name.endswith("8bit")]


def work(folder, name, **train_keys):
    """All weights train, of which the embedding (400 x 32) is large enough to have 8-bit states."""
    settings = {"optimizer": name, "learning_rate": RATES[name], "scheduler": "constant"} | train_keys
    return workload(folder, full.Method(full.Config(name="full")), **settings)


def stopped(folder, name, at, **train_keys):
    with pytest.raises(Interrupted):
        train(work(folder, name, reporter=StopAt(at), **train_keys))
    again = work(folder, name, **train_keys)
    return again, again.run.latest_checkpoint()


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_and_a_resumed_run_equals_a_straight_one(tmp_path, name):
    accumulation = 2 if name == "adamw_8bit" else 1
    settings = {"max_steps": 12, "batch_size": 6 // accumulation, "gradient_accumulation": accumulation}
    straight = work(tmp_path / "straight", name, **settings)
    model, _ = train(straight)
    curve = losses(straight.run)
    assert curve[12] < 0.8 * curve[1]
    resumed, checkpoint = stopped(tmp_path / "stopped", name, 5, **settings)
    again, _ = train(resumed, checkpoint)
    assert all(torch.equal(tensor, trained_tensors(again)[n]) for n, tensor in trained_tensors(model).items())
    assert losses(resumed.run) == curve


@pytest.mark.parametrize("name", BITS_8)
def test_states_of_large_tensors_are_saved_in_8_bits(tmp_path, name):
    _, checkpoint = stopped(tmp_path, name, 1, max_steps=2)
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    states = [flat(state) for state in saved["state"].values()]
    large = [state for state in states if state["state1"].dtype == torch.uint8]
    assert [state["state1"].numel() for state in large] == [400 * 32]
    assert {"qmap1", "qmap2", "absmax1", "absmax2"} <= large[0].keys()
    small = [state for state in states if state["state1"].dtype == torch.float32]
    assert len(small) == len(states) - 1 and all(state["state1"].numel() < 4096 for state in small)


def flat(state):
    """Return the tensors of a state; bitsandbytes keeps its own one level down."""
    found = {}
    for key, value in state.items():
        found |= flat(value) if isinstance(value, dict) else {key: value}
    return found


class Two(nn.Module):
    def __init__(self, shape=(80, 80)):
        super().__init__()
        torch.manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(shape))
        self.vector = nn.Parameter(torch.randn(shape[0]))


def optimizer_of(model, name, tmp_path):
    section = TrainSection(output_dir=str(tmp_path), optimizer=name, learning_rate=0.1, weight_decay=0.5)
    args = TrainingArguments(
        output_dir=str(tmp_path), optim=LIBRARY_NAMES[name], learning_rate=0.1, weight_decay=0.5, use_cpu=True,
        report_to=[],
    )  # fmt: skip
    return build_optimizer(full.Method(full.Config(name="full")), model, args, section)


@pytest.mark.parametrize("name", NAMES)
def test_matrices_decay_and_vectors_do_not(tmp_path, name):
    model = Two()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = optimizer_of(model, name, tmp_path)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.matrix.detach(), before["matrix"] * (1 - 0.1 * 0.5))
    assert torch.equal(model.vector, before["vector"])


@pytest.mark.parametrize("name", NAMES)
def test_the_first_step_is_as_long_as_the_learning_rate(tmp_path, name):
    """Gradients of 1 everywhere: Adam's step is the rate itself, Adafactor's too once its own scaling is off."""
    model = Two()
    before = model.vector.detach().clone()
    optimizer = optimizer_of(model, name, tmp_path)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.testing.assert_close(before - model.vector.detach(), torch.full_like(before, 0.1), rtol=2e-2, atol=0)
