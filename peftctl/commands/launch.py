"""The command that starts a run in several processes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence


def launch_command(recipe: str, overrides: Sequence[str], *, deepspeed: bool, processes: int, gpus: bool) -> str:
    """Return what to type to train a recipe on this machine.

    Args:
        recipe: As given on the command line.
        overrides: KEY=VALUE arguments.
        deepspeed: Whether the recipe trains through DeepSpeed.
        processes: How many are to train together, each on a device of its own.
        gpus: Whether the devices are GPUs.
    """
    launcher = ["peftctl"]
    if processes > 1 and deepspeed:
        count = "--num_gpus" if gpus else "--num_accelerators"
        launcher = ["deepspeed", count, str(processes), "--module", "peftctl"]
    elif processes > 1:
        launcher = ["torchrun", "--standalone", "--nproc_per_node", str(processes), "-m", "peftctl"]
    line = shlex.join([*launcher, "train", recipe, *overrides])
    return line if gpus or not deepspeed else f"DS_ACCELERATOR=cpu {line}"
