"""Two real processes through each launcher: they train what one does, leave the same files, and end together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scripts import two_processes
from tests.commands.helpers import REPOSITORY, peftctl, write_recipe, write_rows

LORA = {"name": "lora", "r": 4, "dropout": 0.0, "target_modules": "all-linear"}
through = two_processes.overrides
HALVED = ("train.batch_size=2", "train.gradient_accumulation=2")
FSDP = ("backend.name=fsdp", "train.gradient_checkpointing=true")
TORCHRUN = two_processes.command("ddp", "-m", "peftctl", "train")
DEEPSPEED = (
    sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--module", "peftctl", "train",
)  # fmt: skip
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="finds ranks in /proc")
GPUS = ("scripts/launch_gpus.sh", "-n", "2")
ACCELERATE = ("scripts/launch_accelerate.sh", "-n", "2")
NODES = ("scripts/launch_nodes.sh", "HOSTFILE")


def start(launcher, *arguments):
    """Start a launcher without waiting for it."""
    environment = two_processes.environment()
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return subprocess.Popen(
        [*launcher, *map(str, arguments)],
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
    (recipe.parent / "hosts").write_text("localhost slots=2\n")
    launcher = [str(recipe.parent / "hosts") if word == "HOSTFILE" else word for word in launcher]
    code, printed = ended(start(launcher, recipe, f"train.output_dir={out}", *HALVED, *overrides))
    assert code == 0, printed[-3000:]
    assert json.loads((out / "environment.json").read_text())["world_size"] == 2
    return out, printed


@pytest.mark.parametrize(
    ("name", "launcher", "overrides"),
    [("fsdp", GPUS, FSDP), ("zero1", ACCELERATE, through("zero1")), ("zero2_offload", NODES, through("zero2_offload")),
     ("zero3", DEEPSPEED, through("zero3"))],
)  # fmt: skip
def test_two_processes_leave_what_one_leaves(recipe, single, name, launcher, overrides):
    run, printed = launched(launcher, recipe, name, *overrides)
    assert_same_run(run, single)
    assert [line["eval_loss"] for line in lines(run) if "eval_loss" in line] == pytest.approx(
        [line["eval_loss"] for line in lines(single) if "eval_loss" in line], abs=1e-4
    )
    assert "[transformers]" not in printed
    assert printed.count("held-out rows\n") == 1 and printed.count("result: ") == 1  # only one process speaks
    files = {file.name for file in (run / "checkpoints" / "checkpoint-6").iterdir()}
    assert files == {
        "trainable.safetensors", "method.pt", "stage.json", "optimizer.pt", "scheduler.pt", "trainer_state.json",
        "rng_state_0.pth", "rng_state_1.pth",
    }  # fmt: skip
    size = sum(file.stat().st_size for file in (run / "checkpoints" / "checkpoint-6").glob("trainable*"))
    assert size < 2 * 4 * sum(tensor.numel() for tensor in weights(run).values())  # the frozen base is not in it


# -- processes that end ----------------------------------------------------------------------------------------------


def rank_of(run, rank):
    """Return the pid of the rank of a launched run."""
    for entry in Path("/proc").iterdir():
        try:
            arguments = (entry / "cmdline").read_text() if entry.name.isdigit() else ""
            variables = (entry / "environ").read_bytes().split(b"\0") if str(run) in arguments else []
        except OSError:
            continue
        if f"RANK={rank}".encode() in variables:
            return int(entry.name)
    pytest.fail(f"rank {rank} is not there")


def wait_for_step(run, step, process, timeout=120):
    """Wait until a run has logged a step."""
    until = time.monotonic() + timeout
    while time.monotonic() < until and process.poll() is None:
        if (run / "metrics.jsonl").is_file() and f'"step": {step},' in (run / "metrics.jsonl").read_text():
            return
        time.sleep(0.05)
    pytest.fail(f"step {step} never came: {ended(process, 5)[1][-2000:]}")


@pytest.fixture(scope="module")
def long(recipe):
    """A longer run: its overrides, and what one process comes to."""
    overrides = ("train.max_steps=40", "train.learning_rate=0.002", "train.save_steps=4", "train.eval_steps=null")
    out = recipe.parent / "long"
    done = peftctl("train", recipe, f"train.output_dir={out}", *overrides)
    assert done.returncode == 0, done.stderr
    return overrides, out


def killed(recipe, long, name, rank):
    """Kill a rank in the middle of the longer run; return the run directory, and how it had been started."""
    out = recipe.parent / name
    arguments = (recipe, f"train.output_dir={out}", *HALVED, *long[0])
    process = start(TORCHRUN, *arguments)
    wait_for_step(out, 9, process)
    pid = rank_of(out, rank)
    os.kill(pid, signal.SIGKILL)
    at = time.monotonic()
    code, printed = ended(process)
    assert code != 0 and time.monotonic() - at < 60
    assert printed.count(f"error: rank {rank} (process {pid} on ") == 1 and "--resume" in printed
    return out, arguments


@LINUX
def test_without_the_first_rank_another_one_tells(recipe, long):
    killed(recipe, long, "killed-0", 0)


@LINUX
def test_a_run_whose_rank_was_killed_goes_on_through_another_engine(recipe, long):
    out, arguments = killed(recipe, long, "killed-1", 1)
    code, printed = ended(start(TORCHRUN, *arguments, *through("zero2"), "--resume"))
    assert code == 0 and "resuming after step" in printed, printed[-3000:]
    assert_same_run(out, long[1])


def test_a_signal_to_the_launcher_stops_all_after_the_same_step(recipe, long):
    overrides, straight = long
    out = recipe.parent / "stopped"
    arguments = (recipe, f"train.output_dir={out}", *HALVED, *overrides)
    process = start(TORCHRUN, *arguments)
    wait_for_step(out, 6, process)
    process.send_signal(signal.SIGTERM)
    code, printed = ended(process)
    assert code != 0 and printed.count("error: stopped by SIGTERM after step ") == 1, printed[-3000:]
    step = int(printed.partition("stopped by SIGTERM after step ")[2].split(";")[0])
    assert (out / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json").is_file()
    # One process goes on where two were stopped.
    done = peftctl("train", recipe, f"train.output_dir={out}", "train.batch_size=8", *overrides, "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_run(out, straight)


def test_another_number_of_rows_a_step_is_refused_once(recipe, single):
    code, printed = ended(start(TORCHRUN, recipe, f"train.output_dir={single}", "--resume"))
    assert code != 0 and printed.count("error: ") == 1, printed[-3000:]
    assert "rows a step (train.batch_size * train.gradient_accumulation * processes): 8 -> 16" in printed


def test_what_is_wrong_is_said_once_and_nothing_is_written(recipe):
    out = recipe.parent / "wrong"
    code, printed = ended(start(TORCHRUN, recipe, f"train.output_dir={out}", "train.batchsize=2"))
    assert code != 0 and printed.count("did you mean 'batch_size'?") == 1 and not out.exists()
    code, printed = ended(start(TORCHRUN, recipe, f"train.output_dir={out}", "method.target_modules=[nothing]"))
    assert code != 0 and printed.count("error: ") == 1 and "nothing" in printed and not out.exists(), printed[-3000:]


def test_rows_are_encoded_once_and_a_script_of_ones_own_ends_in_peace(tmp_path, tiny_dir):
    recipe = write_recipe(tmp_path, tiny_dir, method=LORA)
    write_rows(recipe.parent / "train.jsonl", count=22, first=int(time.time()))  # not in the cache yet
    script = REPOSITORY / "tests" / "commands" / "encodes_once.py"
    code, printed = ended(start([*TORCHRUN[: TORCHRUN.index("2") + 1], str(script)], recipe))
    assert code == 0, printed[-3000:]
    assert [f"rank {rank} has adapter after 6 steps" in printed for rank in (0, 1)] == [True, True]
    assert "error" not in printed
