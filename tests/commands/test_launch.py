"""The command that a dry run shows, and the rules of several processes that need none."""

import json
import shlex

import pytest
import torch

import peftctl
from peftctl.commands.launch import launch_command
from peftctl.errors import RecipeError, RunError
from tests.commands.helpers import write_recipe
from tests.commands.test_cli import run

DEEPSPEED = ["backend.name=deepspeed", "backend.config=configs/deepspeed/zero2.json"]


@pytest.mark.parametrize(
    ("deepspeed", "processes", "gpus", "expected"),
    [
        (False, 1, True, "peftctl train 'my recipe.yaml' train.seed=1"),
        (True, 1, True, "peftctl train 'my recipe.yaml' train.seed=1"),
        (False, 4, True, "torchrun --standalone --nproc_per_node 4 -m peftctl train 'my recipe.yaml' train.seed=1"),
        (True, 4, True, "deepspeed --num_gpus 4 --module peftctl train 'my recipe.yaml' train.seed=1"),
        (
            True, 2, False,
            "DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 --module peftctl train 'my recipe.yaml' train.seed=1",
        ),
    ],
)  # fmt: skip
def test_the_command_that_starts_a_run(deepspeed, processes, gpus, expected):
    line = launch_command("my recipe.yaml", ["train.seed=1"], deepspeed=deepspeed, processes=processes, gpus=gpus)
    assert line == expected and "my recipe.yaml" in shlex.split(line)


def test_a_dry_run_plans_for_processes_and_shows_how_to_start_them(capsys, tmp_path, tiny_dir):
    path = str(write_recipe(tmp_path, tiny_dir, train={"max_steps": None}))
    code, out, _ = run(capsys, "train", path, *DEEPSPEED, "--dry-run", "--processes", "2", "--json")
    content = json.loads(out)
    assert code == 0
    start = f"--module peftctl train {path} {' '.join(DEEPSPEED)}"
    assert content["launch"].endswith(start) and " 2 --module" in content["launch"]
    code, out, _ = run(capsys, "train", path, "--dry-run")
    assert code == 0 and f"start it with: peftctl train {path}" in out
    code, _, err = run(capsys, "train", path, "--processes", "2")
    assert code == 2 and "start them with a launcher" in err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw_8bit", "paged_adamw_32bit"])
def test_optimizers_that_engines_can_not_divide_are_refused(tmp_path, tiny_dir, optimizer):
    path = write_recipe(tmp_path, tiny_dir)
    for engine in (DEEPSPEED, ["backend.name=fsdp"]):
        with pytest.raises(RecipeError, match=f"train.optimizer: {optimizer} can't be divided .*use adamw or sgd"):
            peftctl.load_recipe(path, [*engine, f"train.optimizer={optimizer}"])
    with pytest.raises(RecipeError, match=r"train.on_nan: deepspeed has taken the step .*use stop"):
        peftctl.load_recipe(path, [*DEEPSPEED, "train.on_nan=skip"])


def test_what_fsdp_does_not_do_is_refused(tmp_path, tiny_dir):
    path = write_recipe(tmp_path, tiny_dir)
    with pytest.raises(RecipeError, match=r"quantization.bits: fsdp would leave .*whole .*use deepspeed with .*zero3"):
        peftctl.load_recipe(path, ["backend.name=fsdp", "quantization.bits=4"])
    with pytest.raises(RecipeError, match=r"backend.config: only deepspeed reads it"):
        peftctl.load_recipe(path, ["backend.name=fsdp", "backend.config=configs/deepspeed/zero3.json"])


def test_out_of_memory_says_what_to_lower_and_to_what(tmp_path, tiny_dir, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("peftctl.commands.train.run_stages", full)
    recipe = peftctl.load_recipe(write_recipe(tmp_path, tiny_dir))
    with pytest.raises(RunError, match=r"out of device memory; the plan is .* lower it by one of") as caught:
        peftctl.train(recipe)
    assert "\n  train.gradient_checkpointing=true (plan " in str(caught.value)
