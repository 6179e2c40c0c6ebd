"""float16 with a scaled loss, here with the scaler that a GPU would get; TF32; what a CPU refuses."""

from itertools import pairwise

import pytest
import torch

import peftctl
from peftctl.commands.prepare import prepare
from peftctl.errors import RunError, UsageError
from peftctl.methods import full, lora
from peftctl.methods.base import Callback
from peftctl.training import stages
from peftctl.training.arguments import library_arguments
from peftctl.training.precision import autocast_type
from peftctl.training.trainer import MethodTrainer
from tests.commands.helpers import write_recipe
from tests.tiny import tiny_llama
from tests.training.helpers import train, trained_tensors, workload
from tests.training.test_trainer import CONFIG, diverging, lines


@pytest.fixture
def scaler(monkeypatch):
    """Give runs a loss scaler on the CPU, where the libraries make none; returns the scale at every step."""

    def use(first):
        scales = []

        class Scaled(MethodTrainer):
            def __init__(self, *args):
                super().__init__(*args)
                self.accelerator.native_amp = True
                self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=first, growth_interval=4)

            def _get_grad_norm(self, *args, **norm):
                scales.append(self.accelerator.scaler.get_scale())
                return super()._get_grad_norm(*args, **norm)

        monkeypatch.setattr(stages, "MethodTrainer", Scaled)
        return scales

    return use


def in_float16(folder, **train):
    return workload(folder, lora.Method(CONFIG), dtype="float16", **train)


def test_a_scaled_loss_in_float16_trains_as_float32_does_and_goes_on_after_a_stop(tmp_path, scaler):
    exact = workload(tmp_path / "exact", lora.Method(CONFIG))
    train(exact)
    scales = scaler(2.0**10)
    straight = in_float16(tmp_path / "straight", save_steps=3)
    model, _ = train(straight)
    assert scales == [2.0**10] * 4 + [2.0**11] * 2
    for key in ("loss", "grad_norm"):  # products are rounded, and nothing is left scaled
        assert [line[key] for line in lines(straight.run)] == pytest.approx(
            [line[key] for line in lines(exact.run)], rel=1e-2
        )
    again = in_float16(tmp_path / "straight", save_steps=3)
    resumed, _ = train(again, straight.run.checkpoints / "checkpoint-3")
    assert scales[6:] == scales[3:6]  # the scaler's state is in the checkpoint
    for name, tensor in trained_tensors(resumed).items():
        assert tensor.dtype is torch.float32
        torch.testing.assert_close(tensor, trained_tensors(model)[name], rtol=0, atol=1e-6)


def test_a_scale_that_is_too_large_costs_a_step_and_does_not_end_the_run(tmp_path, scaler):
    finite = []

    class Looks(Callback):
        def after_optimizer(self, info):
            gradients = [p.grad for p in info.model.parameters() if p.requires_grad]
            finite.append(all(torch.isfinite(gradient).all() for gradient in gradients))

    scales = scaler(2.0**40)
    work = in_float16(tmp_path, max_steps=40)
    work.method.callbacks = lambda model: [Looks()]
    model, totals = train(work, model=tiny_llama().half())
    lost = sum(after < before for before, after in pairwise(scales))
    assert all(finite) and 10 < len(finite) == 40 - lost  # schedules see the steps that are taken
    assert scales[0] == 2.0**40 and scales[-1] < 2.0**30 and totals.steps == 40
    assert all(torch.isfinite(t).all() for t in trained_tensors(model).values())


def test_a_loss_that_no_scale_makes_finite_ends_the_run(tmp_path, scaler):
    scales = scaler(4.0)
    work, _ = diverging(tmp_path, dtype="float16")
    work.method.loss = lambda model, batch, forward: {"loss": forward(batch).cross_entropy() * float("nan")}
    with pytest.raises(RunError, match=r"step 3: the gradient is not finite"):
        train(work, model=tiny_llama().half())
    assert scales == [4.0, 2.0, 1.0]


@pytest.mark.parametrize(("setting", "given"), [(True, None), (False, False)])
def test_tf32_is_left_to_the_hardware_or_ruled_out(tmp_path, setting, given, monkeypatch):
    work = workload(tmp_path, tf32=setting)
    seen = {}
    monkeypatch.setattr("peftctl.training.arguments.TrainingArguments", lambda **options: seen.update(options))
    library_arguments(work.recipe, work.run, autocast=None, max_steps=1, use_cpu=True, select=False, leaves_out=False)
    assert seen["tf32"] is given


def test_float16_is_refused_where_nothing_scales_the_loss(tmp_path, tiny_dir):
    recipe = peftctl.load_recipe(write_recipe(tmp_path, tiny_dir), ["model.dtype=float16"])
    with pytest.raises(UsageError, match=r"model.dtype: float16 trains on GPUs only; take bfloat16, float32 or auto"):
        prepare(recipe, device="cpu")
    assert prepare(recipe, device="cuda").recipe.model.dtype == "float16"


@pytest.mark.parametrize(
    ("method", "types"),
    [
        (lora.Method(lora.Config()), {"float32": None, "bfloat16": None, "float16": "float16"}),
        (full.Method(full.Config()), {"float32": None, "bfloat16": "bfloat16", "float16": "float16"}),
    ],
)
def test_what_runs_under_autocast(tmp_path, method, types):
    recipe = workload(tmp_path).recipe
    for dtype, expected in types.items():
        model = recipe.model.model_copy(update={"dtype": dtype})
        assert autocast_type(recipe.model_copy(update={"model": model}), method) == expected
