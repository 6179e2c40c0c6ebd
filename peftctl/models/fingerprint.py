"""A fingerprint of base weights: tells another base from the same one, whatever dtype either was loaded in.

Of every tensor at most 4096 values, spread over it, are rounded to bfloat16 and hashed together with its shape. So a
float32 and a bfloat16 load agree; a float16 load agrees with them where the checkpoint itself is stored in 16 bits.
Names do not count, and equal matrices count once: neither a prefix that a wrapper adds nor a tied head that a file
repeats changes the result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from peftctl.models.classifier import backbone_of, bare

_SAMPLES = 4096
_GOLDEN = 0.6180339887498949
_SMALLEST = 2.0**-14
"""float16 keeps fewer digits below this magnitude, so smaller values count as 0."""


def weights_fingerprint(model: Any) -> str:
    """Return the sha256 (hex) of a model's base weights.

    Args:
        model: A plain model, or a PeftModel, of which adapters, prompts and trained copies of modules are left out; so
            is the head of a classifier, which is new in every run.
    """
    base = backbone_of(bare(model))
    return _digest({id(tensor): tensor for tensor in _base_tensors(base)}.values())  # files hold a shared tensor once


def directory_fingerprint(path: str | Path) -> str:
    """Return the same from the *.safetensors files of a directory, reading only the sampled pages.

    It equals the loaded model's where the files hold exactly the model's tensors, as `save_pretrained` writes them.
    """
    return _digest(_stored_tensors(Path(path)))


def _base_tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Yield what `save_pretrained` of the base would write: parameters and persistent buffers, without adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(module, BaseTunerLayer):
        yield from _base_tensors(module.get_base_layer())
        return
    if isinstance(module, AuxiliaryTrainingWrapper):
        yield from _base_tensors(module.original_module)
        return
    yield from module.parameters(recurse=False)
    kept = dict(module.named_buffers(recurse=False))
    yield from (buffer for name, buffer in kept.items() if name not in module._non_persistent_buffers_set)
    for child in module.children():
        yield from _base_tensors(child)


def _stored_tensors(folder: Path) -> Iterator[torch.Tensor]:
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                yield opened.get_tensor(name)


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    matrices: set[bytes] = set()
    vectors: list[bytes] = []
    for tensor in tensors:
        if tensor.dim() > 1:
            matrices.add(_tensor_digest(tensor))
        else:  # many start equal: biases at 0, norms at 1
            vectors.append(_tensor_digest(tensor))
    return hashlib.sha256(b"".join([*sorted(matrices), *sorted(vectors)])).hexdigest()


@torch.no_grad()
def _tensor_digest(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    if len(flat) > _SAMPLES:
        flat = flat[_positions(len(flat)).to(flat.device)]
    # Straight from the stored type to bfloat16: a detour would round twice.
    values = flat.to(torch.bfloat16).float().cpu()
    values = torch.where(values.abs() < _SMALLEST, 0.0, values)
    return hashlib.sha256(repr(tuple(tensor.shape)).encode() + values.numpy().tobytes()).digest()


def _positions(count: int) -> torch.Tensor:
    """Return one position in each of as many equal stretches, placed so that no row and hardly a column is left out."""
    stretch = torch.arange(_SAMPLES, dtype=torch.float64)
    return ((stretch + (stretch * _GOLDEN).frac()) * (count / _SAMPLES)).long().clamp_(max=count - 1)
