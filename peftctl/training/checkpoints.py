"""What a checkpoint holds beyond the Trainer's own files: the optimized tensors, the method's state, the stage.

    checkpoint-N/  trainable.safetensors  method.pt  stage.json
                   optimizer.pt  scheduler.pt  rng_state.pth  trainer_state.json

Only tensors that the optimizer owns are saved, by name: the frozen base is never copied.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from peftctl.errors import ArtifactError
from peftctl.methods.base import Method

TENSORS, METHOD, STAGE, OPTIMIZER = "trainable.safetensors", "method.pt", "stage.json", "optimizer.pt"
Whole = tuple[dict[str, torch.Tensor], dict[str, Any]]
"""The optimized tensors by name, and the method's state."""


@dataclass(frozen=True)
class StageMark:
    """Where in the run a checkpoint stands.

    Args:
        index: Position of the stage.
        name: Its name.
        offset: Optimizer steps of the stages before it.
        train_tokens: Tokens seen so far, padding excluded.
        supervised_tokens: Those that were trained on.
        seconds: Training time so far.
        best: Optimizer steps at the lowest held-out loss so far, where `load_best` will need that checkpoint.
    """

    index: int
    name: str
    offset: int
    train_tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    best: int | None = None


def write_state(
    folder: Path, tensors: Mapping[str, torch.Tensor], method_state: Mapping[str, Any], mark: StageMark
) -> None:
    """Write our part of a checkpoint into a folder that is renamed into place afterwards."""
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, folder / TENSORS)
    torch.save(method_state, folder / METHOD)
    (folder / STAGE).write_text(json.dumps(asdict(mark)), encoding="utf-8")


def read_mark(folder: Path) -> StageMark:
    """Return where a checkpoint stands."""
    try:
        return StageMark(**json.loads((folder / STAGE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(folder, error) from error


def read_state(folder: Path, model: nn.Module, method: Method) -> None:
    """Restore the method's state and copy the saved tensors into the model.

    Raises:
        ArtifactError: A file is damaged, or the tensors are not those of this model.
    """
    restore(model, method, *read_tensors(folder), where=folder)


def read_tensors(folder: Path) -> Whole:
    """Return the optimized tensors of a checkpoint by name, and the method's state.

    Raises:
        ArtifactError: A file is damaged.
    """
    try:
        return load_file(folder / TENSORS), torch.load(folder / METHOD, weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError) as error:
        raise _damaged(folder, error) from error


def restore(
    model: nn.Module, method: Method, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any], *, where: Path
) -> None:
    """Put the method's state and its tensors into a model that `Method.apply` has made.

    Raises:
        ArtifactError: The tensors are not those of this model.
    """
    method.load_state_dict(model, state)  # first: it may decide which tensors there are
    parameters = dict(model.named_parameters())
    wrong = [n for n, t in tensors.items() if n not in parameters or parameters[n].shape != t.shape]
    if wrong:
        raise ArtifactError(f"{where}: holds tensors that this model does not have, e.g. {wrong[0]}; use --fresh")
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def _damaged(folder: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"{folder}: the checkpoint is damaged ({error}); delete it to go on from an earlier one")
