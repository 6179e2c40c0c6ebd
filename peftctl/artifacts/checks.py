"""Post-conditions: what an artefact must fulfil before it gets its name, and after it was read back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from peftctl.errors import ArtifactError
from peftctl.models.classifier import classification_task
from peftctl.models.supervised import decoder_inputs

ADAPTER_WEIGHTS = "adapter_model.safetensors"

# Tokens of a probe row: enough to tell models apart, few enough that the logits of a large vocabulary fit in memory.
PROBE_TOKENS = 64

# Largest |difference| of a logit, as a share of the largest |logit|, between two models of the same weights, type and
# kernels on one machine. Measured: exactly 0. The room is one unit in the last place of the result; another attention
# kernel alone makes 2e-6, 2e-2 to 3e-2 and 3e-3 to 4e-3 (SmolLM2-135M, tiny Llama), so `load` takes the run's.
SAME_LOGITS = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def snapshot(model: nn.Module) -> dict[str, str]:
    """Return a digest of every trainable tensor, so that later one can tell whether anything moved.

    A float32 tensor also gets digests of its casts to the half types, because the result may be stored in one.
    """
    return {name: _digests(p) for name, p in model.named_parameters() if p.requires_grad}


def check_moved(model: nn.Module, initial: Mapping[str, str]) -> None:
    """Raise where not one trainable tensor differs from what it was before training.

    Args:
        model: After training, in the type that it is stored in.
        initial: What `snapshot` returned before.

    Raises:
        ArtifactError: Nothing moved, so training had no effect that the artefact could hold.
    """
    parameters = dict(model.named_parameters())
    if not any(_digest(parameters[n]) not in initial[n].split() for n in initial.keys() & parameters.keys()):
        raise ArtifactError(
            f"nothing was learned: all {len(initial)} trainable tensors still have their initial values; "
            "raise train.learning_rate or train longer"
        )


def read_keys(file: Path) -> set[str]:
    """Return the names of the tensors in a safetensors file.

    Raises:
        ArtifactError: The file is missing, cut or damaged.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            return set(tensors.keys())
    except FileNotFoundError as error:
        raise ArtifactError(f"{file}: is missing") from error
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{file}: is damaged or cut off ({error}); write or fetch it again") from error


def check_weights(folder: Path, expected: Iterable[str] | None = None) -> None:
    """Check every safetensors file of a folder: readable, the expected names, nothing empty, everything finite.

    Args:
        folder: An adapter or a model directory.
        expected: Names over all files; None takes them as they are.

    Raises:
        ArtifactError: What is wrong, with the file and the first tensors concerned.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ArtifactError(f"{folder}: holds no safetensors file")
    found: set[str] = set()
    for file in files:
        found |= read_keys(file)
        _check_values(file)
    if expected is not None and found != (wanted := set(expected)):
        raise ArtifactError(f"{folder}: {_difference(found, wanted)}")


def probe_logits(model: Any, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the logits of some rows, one forward a row so that no padding takes part.

    An encoder-decoder is asked to write what it reads: any decoder input shows whether two models agree.

    Args:
        model: In eval mode.
        rows: Token ids; only the first PROBE_TOKENS of each are taken.

    Returns:
        (positions of all rows, classes or vocabulary), float32, on the CPU.
    """
    device = next(model.parameters()).device
    pieces = []
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row[:PROBE_TOKENS]], device=device)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if model.config.is_encoder_decoder and not classification_task(model):
                inputs["decoder_input_ids"] = decoder_inputs(model, ids)
            logits = model(**inputs).logits
            pieces.append(logits.reshape(-1, logits.shape[-1]).float().cpu())
    return torch.cat(pieces)


def check_reload(reference: torch.Tensor, model: Any, rows: Sequence[Sequence[int]], path: Path) -> None:
    """Raise where a model that was read back does not answer like the one that was written.

    Args:
        reference: `probe_logits` of the model that was written.
        model: What `load` returned.
        rows: The rows of `reference`.
        path: The artefact, for the message.

    Raises:
        ArtifactError: The logits differ by more than the model's type explains.
    """
    logits = probe_logits(model, rows)
    if not agree(reference, logits, model.dtype):
        delta = (logits - reference).abs().max() if logits.shape == reference.shape else float("nan")
        raise ArtifactError(
            f"{path}: what was saved is not what was trained: reloaded, its logits differ by up to {delta:.3g}"
        )


def agree(reference: torch.Tensor, logits: torch.Tensor, dtype: torch.dtype) -> bool:
    """Tell whether two sets of logits are the same up to the rounding of a type; NaN never agrees."""
    if logits.shape != reference.shape:
        return False
    limit = SAME_LOGITS[dtype] * reference.abs().max()
    return bool((logits - reference).abs().max() <= limit)


def _check_values(file: Path) -> None:
    empty, broken = [], []
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  # not a dictionary
            tensor = tensors.get_tensor(name)
            if tensor.numel() == 0:
                empty.append(name)
            elif not torch.isfinite(tensor).all():
                broken.append(name)
    for names, what in ((empty, "are empty"), (broken, "hold NaN or infinity")):
        if names:
            raise ArtifactError(f"{file}: {len(names)} tensors {what}: {_some(names)}")


def _difference(found: set[str], wanted: set[str]) -> str:
    parts = []
    if missing := wanted - found:
        parts.append(f"{len(missing)} tensors are missing: {_some(missing)}")
    if extra := found - wanted:
        parts.append(f"{len(extra)} tensors are not of this model: {_some(extra)}")
    return "; ".join(parts)


def _some(names: Iterable[str]) -> str:
    first, *rest = sorted(names)
    return first + (", ..." if rest else "")


def _digests(tensor: torch.Tensor) -> str:
    casts = (torch.bfloat16, torch.float16) if tensor.dtype is torch.float32 else ()
    return " ".join([_digest(tensor), *(_digest(tensor.detach().to(dtype)) for dtype in casts)])


def _digest(tensor: torch.Tensor) -> str:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(raw.data).hexdigest()
