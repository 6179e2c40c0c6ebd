"""Kill runs in two processes at random, resume them, and compare with the run that nobody disturbed.

    python scripts/fault_suite.py [--runs 30] [--seed 0]

A fault is SIGKILL or SIGTERM to a rank, to all or to the launcher, after a random time (so also while a checkpoint is
written), or a disk that runs full (a small one in memory, which only root may mount). Every run goes on with --resume,
through an engine drawn anew. A run that does not end within a minute, a checkpoint that does not load, a leftover or a
weight that differs fails the suite. It takes about a minute a run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts and tests, from wherever this is run
from scripts import two_processes
from scripts.two_processes import ROOT, environment

ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp")
FAULTS = ("kill rank", "kill all", "terminate rank", "terminate launcher", "full disk")
STEPS, TOLERANCE = 40, 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        recipe, straight = prepare(Path(folder))
        for number in range(options.runs):
            fault, story = draw.choice(FAULTS if os.geteuid() == 0 else FAULTS[:-1]), []
            with disk(Path(folder) / f"disk{number}", fault) as place:
                problem = disturbed(place / "run", recipe, straight, fault, draw, story)
            failed += bool(problem)
            print(f"{number + 1}/{options.runs} {'; '.join(story)}: {problem or 'equal'}", flush=True)
    sys.exit(f"{failed} of {options.runs} runs failed" if failed else 0)


@contextlib.contextmanager
def disk(place: Path, fault: str) -> Iterator[Path]:
    """A folder for a run; on a disk of its own where it is to run full."""
    place.mkdir()
    small = fault == "full disk"
    if small:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "peftctl-faults", str(place)], check=True)
    try:
        yield place
    finally:
        if small:
            subprocess.run(["umount", "--lazy", str(place)], check=True)
        shutil.rmtree(place, ignore_errors=True)


def prepare(folder: Path) -> tuple[Path, Path]:
    """Write a recipe on a tiny model, and train it in one process without a fault."""
    from tests.commands.helpers import write_recipe
    from tests.tiny import save_tiny

    method = {"name": "lora", "r": 4, "dropout": 0.0, "target_modules": "all-linear"}
    train = {"max_steps": STEPS, "batch_size": 8, "save_steps": 2, "logging_steps": 1, "learning_rate": 0.002}
    recipe = write_recipe(folder, save_tiny(folder / "tiny"), method=method, train=train)
    done = subprocess.run(
        command("single", recipe, folder / "straight"), env=environment(), cwd=ROOT, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"the undisturbed run failed: {done.stderr[-2000:]}")
    return recipe, folder / "straight"


def command(engine: str, recipe: Path, out: Path) -> list[str]:
    halved = [] if engine == "single" else ["train.batch_size=2", "train.gradient_accumulation=2"]
    program = "-m", "peftctl", "train", recipe, f"train.output_dir={out}"
    return [*two_processes.command(engine, *program), *two_processes.overrides(engine), *halved]


def disturbed(out: Path, recipe: Path, straight: Path, fault: str, draw: random.Random, story: list[str]) -> str:
    """Run with a fault, resume until it is complete; return what is wrong, or nothing."""
    engine = draw.choice(ENGINES)
    story.append(f"{engine}, {fault}")
    printed = recipe.parent / "printed.log"
    with printed.open("w") as log:
        process = subprocess.Popen(
            command(engine, recipe, out), env=environment(), cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        if wait_for_step(out, draw.randrange(1, STEPS), process):
            time.sleep(draw.random())  # somewhere in a step, or in a checkpoint
            began = time.monotonic()
            strike(fault, process, out, draw)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return "still running a minute after the fault"
            story.append(f"ended after {time.monotonic() - began:.0f} s with {process.returncode}")
        process.wait()
    (out.parent / "filler").unlink(missing_ok=True)
    if broken := unreadable(out):
        return broken
    again = draw.choice((*ENGINES, "single"))
    story.append(f"resumed through {again}")
    done = subprocess.run(
        [*command(again, recipe, out), "--resume"], env=environment(), cwd=ROOT, check=False,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return difference(out, straight) if done.returncode == 0 else f"resume: {(done.stdout + done.stderr)[-800:]}"


def unreadable(out: Path) -> str:
    """Return which checkpoint can't be read; nothing where all can."""
    for checkpoint in sorted(out.glob("checkpoints/checkpoint-*")):
        try:
            load_file(checkpoint / "trainable.safetensors")
            for name in ("method.pt", "optimizer.pt", "scheduler.pt"):
                torch.load(checkpoint / name, weights_only=True)
            json.loads((checkpoint / "trainer_state.json").read_text())
        except Exception as error:
            return f"{checkpoint.name} does not load: {error}"
    return ""


def wait_for_step(out: Path, step: int, process: subprocess.Popen) -> bool:
    """Wait until a run has logged a step; False where it has ended before."""
    while process.poll() is None:
        metrics = out / "metrics.jsonl"
        if metrics.is_file() and f'"step": {step},' in metrics.read_text():
            return True
        time.sleep(0.02)
    return False


def strike(fault: str, process: subprocess.Popen, out: Path, draw: random.Random) -> None:
    ranks = ranks_of(out)
    if fault == "full disk":
        with (out.parent / "filler").open("wb") as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(2**16))
                filler.flush()
        return
    if fault == "terminate launcher":
        process.send_signal(signal.SIGTERM)
        return
    chosen = ranks if fault == "kill all" else [draw.choice(ranks)] if ranks else []
    for pid in chosen:
        os.kill(pid, signal.SIGTERM if fault.startswith("terminate") else signal.SIGKILL)
    if fault == "kill all":
        process.kill()


def ranks_of(out: Path) -> list[int]:
    """Return the pids of a run's ranks."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            arguments = (entry / "cmdline").read_text() if entry.name.isdigit() else ""
            variables = (entry / "environ").read_bytes().split(b"\0") if f"output_dir={out}" in arguments else []
        except OSError:
            continue
        if any(variable.startswith(b"RANK=") for variable in variables):
            found.append(int(entry.name))
    return sorted(found)


def difference(out: Path, straight: Path) -> str:
    """Return how a run differs from the undisturbed one, or what it has left; nothing where it is as it should be."""
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    if [step for step in steps if step] != list(range(1, STEPS + 1)):
        return f"metrics.jsonl has the steps {steps}"
    leftovers = [
        entry.name for folder in (out, out / "checkpoints") for entry in folder.iterdir() if ".tmp-" in entry.name
    ]
    if leftovers:
        return f"left {leftovers}"
    weights, expected = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (out, straight))
    apart = max(float((weights[name] - tensor).abs().max()) for name, tensor in expected.items())
    return "" if torch.isfinite(torch.tensor(apart)) and apart <= TOLERANCE else f"weights differ by {apart:.2g}"


if __name__ == "__main__":
    main()
