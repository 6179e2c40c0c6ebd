"""What methods read of finished runs that they build on: prompts, and the parts that a run keeps (`Method.parts`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peftctl.errors import UsageError

if TYPE_CHECKING:
    import torch


def adapter_folder(run: str) -> Path:
    """Return adapter/ of a run directory; any other folder is taken for an adapter's own."""
    inside = Path(run).expanduser() / "adapter"
    return inside if inside.is_dir() else inside.parent


def read_prompt(run: str, key: str) -> torch.Tensor:
    """Return the prompt of a finished run, (n, d) in float32.

    Args:
        run: Run or adapter directory.
        key: The recipe key that names it, for messages.

    Raises:
        UsageError: It holds no plain prompt, or can't be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = adapter_folder(run)
    hint = "give a finished run of prompt_tuning, or of another method whose result is a prompt"
    try:
        kind = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"]
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UsageError(f"{key}: {run}: expected a prompt, got none that can be read ({error}); {hint}") from error
    if kind != "PROMPT_TUNING":
        raise UsageError(f"{key}: {run}: expected a prompt, got an adapter of type {kind}; {hint}")
    return tensors["prompt_embeddings"].float()


def read_prompts(runs: Sequence[str], key: str, shape: tuple[int, int]) -> torch.Tensor:
    """Return the prompts of finished runs, (runs, n, d) in float32.

    Args:
        runs: Run or adapter directories.
        key: The recipe key that names them, for messages.
        shape: (n, d) of all of them.

    Raises:
        UsageError: One holds no prompt, or one of another shape.
    """
    import torch

    prompts = [read_prompt(run, key) for run in runs]
    for run, prompt in zip(runs, prompts, strict=True):
        if prompt.shape[0] != shape[0]:
            raise UsageError(
                f"method.num_virtual_tokens: expected {prompt.shape[0]}, as {run} of {key} has, got {shape[0]}; "
                "correct it, or train prompts of one length"
            )
        if prompt.shape[1] != shape[1]:
            raise UsageError(
                f"{key}: {run} is a prompt of another base: its vectors are {prompt.shape[1]} wide, the model's "
                f"{shape[1]}; give prompts of this base"
            )
    return torch.stack(prompts)


def read_part(run: str, name: str, key: str) -> dict[str, torch.Tensor]:
    """Return what a finished run kept as parts/NAME.safetensors.

    Raises:
        UsageError: It kept none, or it can't be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(run).expanduser() / "parts" / f"{name}.safetensors"
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{key}: {run}: expected a finished run that has {file}; {error}") from error
