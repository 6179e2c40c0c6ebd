"""Compare the memory plan of a run with the peak that it measures, in one process and in two through every engine.

    python scripts/bench/memory_plan.py [--methods lora full] [--engines single ddp zero2] [--steps 3]

Runs take the demo model and data on this machine's CPU; what is printed stands in every run's
summary.json. Peaks are resident memory of the largest process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts and tests, from wherever this is run
from scripts import two_processes

ENGINES = ("single", "ddp", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "fsdp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["lora", "full"])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    print(f"{'method':12}{'engine':16}{'planned GiB':>12}{'measured GiB':>14}{'error':>8}")
    for method in options.methods:
        for engine in options.engines:
            planned, measured = run(method, engine, options)
            error = planned / measured - 1
            print(f"{method:12}{engine:16}{planned / 2**30:12.2f}{measured / 2**30:14.2f}{error:+8.1%}", flush=True)


def run(method: str, engine: str, options: argparse.Namespace) -> tuple[int, int]:
    """Train a few steps; return the planned and the measured peak of a process, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"train.output_dir={folder}/run", f"train.max_steps={options.steps}", "data.eval=null",
            f"train.batch_size={options.batch_size}", "train.gradient_accumulation=1", f"model.dtype={options.dtype}",
        ]  # fmt: skip
        program = "-m", "peftctl", "train", f"recipes/{method}.yaml", *overrides, *two_processes.overrides(engine)
        done = subprocess.run(
            two_processes.command(engine, *program), env=two_processes.environment(), cwd=two_processes.ROOT,
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{method} {engine}: {(done.stdout + done.stderr)[-2000:]}")
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
        return summary["predicted_memory_bytes"], summary["peak_memory_bytes"]


if __name__ == "__main__":
    main()
