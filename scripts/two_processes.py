"""How scripts and tests start programs on this machine's CPU: alone, or in two processes that train together."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def command(engine: str, *program: str | Path) -> list[str]:
    """Return the command that starts a program (`-m peftctl`, or a file) through an engine of the matrix."""
    return [*([sys.executable] if engine == "single" else TORCHRUN), *map(str, program)]


def backend(engine: str) -> dict[str, str]:
    """Return the `backend:` section of an engine of the matrix, or of configs/deepspeed."""
    if engine.startswith("zero"):
        return {"name": "deepspeed", "config": f"{ROOT}/configs/deepspeed/{engine}.json"}
    return {"name": "fsdp" if engine == "fsdp" else "single"}


def overrides(engine: str) -> list[str]:
    """Return the same as arguments of a command."""
    return [f"backend.{key}={value}" for key, value in backend(engine).items()]


def environment() -> dict[str, str]:
    """Return the variables of such a process: a thread each, and DeepSpeed without accelerators."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
