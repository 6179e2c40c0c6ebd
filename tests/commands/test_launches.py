"""Two real processes through each launcher: they train what one does, leave the same files, and end together."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.commands.helpers import REPOSITORY, peftctl, write_recipe, write_rows

LORA = {"name": "lora", "r": 4, "dropout": 0.0, "target_modules": "all-linear"}
HALVED = ("train.batch_size=2", "train.gradient_accumulation=2")
ZERO = "backend.name=deepspeed", "backend.config=configs/deepspeed/{}.json"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "peftctl")
ACCELERATE = (
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "peftctl",
)  # fmt: skip
DEEPSPEED = ("-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--module", "peftctl")


def start(launcher, *arguments):
    """Start a launcher without waiting for it."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY, env=environment,
        start_new_session=True,
    )  # fmt: skip


def ended(process, timeout=180):
    """Wait for a launcher; return (exit code, what was printed)."""
    try:
        printed, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        pytest.fail(f"still running after {timeout} seconds:\n{printed[-3000:]}")
    return process.returncode, printed


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return [line["loss"] for line in lines(run) if "loss" in line]


def weights(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def assert_same_run(run, other):
    """Assert that two runs had the same losses and came to the same adapter and the same measurement."""
    assert losses(run) == pytest.approx(losses(other), abs=1e-4) and losses(run)
    expected = weights(other)
    assert weights(run).keys() == expected.keys()
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-4)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (run, other)]
    for key in ("steps", "train_tokens", "supervised_tokens", "trainable_parameters"):
        assert summaries[0][key] == summaries[1][key]
    after = [summary["eval"]["after"]["loss"] for summary in summaries]
    assert after[0] == pytest.approx(after[1], abs=1e-3)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_dir):
    """A recipe whose rows do not divide evenly into steps, nor a step into processes."""
    train = {"batch_size": 8, "max_steps": 6, "logging_steps": 1, "save_steps": 3, "eval_steps": 3}
    path = write_recipe(tmp_path_factory.mktemp("launches"), tiny_dir, method=LORA, train=train)
    write_rows(path.parent / "train.jsonl", count=21)
    return path


@pytest.fixture(scope="module")
def single(recipe):
    """The run of one process."""
    out = recipe.parent / "single"
    done = peftctl("train", recipe, f"train.output_dir={out}")
    assert done.returncode == 0, done.stderr
    return out


def launched(launcher, recipe, name, *overrides):
    """Train through a launcher to the end; return the run directory and what was printed."""
    out = recipe.parent / name
    code, printed = ended(start(launcher, "train", recipe, f"train.output_dir={out}", *HALVED, *overrides))
    assert code == 0, printed[-3000:]
    assert json.loads((out / "environment.json").read_text())["world_size"] == 2
    return out, printed


@pytest.mark.parametrize(
    ("name", "launcher", "stage"),
    [("ddp", TORCHRUN, None), ("accelerate", ACCELERATE, None), ("zero1", ACCELERATE, "zero1"),
     ("zero2_offload", TORCHRUN, "zero2_offload"), ("zero3", DEEPSPEED, "zero3")],
)  # fmt: skip
def test_two_processes_leave_what_one_leaves(recipe, single, name, launcher, stage):
    overrides = [key.format(stage) for key in ZERO] if stage else []
    run, printed = launched(launcher, recipe, name, *overrides)
    assert_same_run(run, single)
    assert [line["eval_loss"] for line in lines(run) if "eval_loss" in line] == pytest.approx(
        [line["eval_loss"] for line in lines(single) if "eval_loss" in line], abs=1e-4
    )
    assert printed.count("held-out rows\n") == 1 and printed.count("result: ") == 1  # only one process speaks
    files = {file.name for file in (run / "checkpoints" / "checkpoint-6").iterdir()}
    assert files == {
        "trainable.safetensors", "method.pt", "stage.json", "optimizer.pt", "scheduler.pt", "trainer_state.json",
        "rng_state_0.pth", "rng_state_1.pth",
    }  # fmt: skip
    size = sum(file.stat().st_size for file in (run / "checkpoints" / "checkpoint-6").glob("trainable*"))
    assert size < 2 * 4 * sum(tensor.numel() for tensor in weights(run).values())  # the frozen base is not in it
