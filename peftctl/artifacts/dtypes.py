"""The number type that a model's weights are stored in, and how to change it."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import nn

from peftctl.models.aliases import resolve
from peftctl.models.load import meta_model
from peftctl.recipe.schema import ModelSection

_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def stored_dtype(model: ModelSection) -> str:
    """Return the type of most of a model's weights: float32, bfloat16 or float16.

    A directory is read by its files' headers, a hub id by its configuration; .gguf files, whose types are their own,
    give the section's.
    """
    place = Path(resolve(model.name_or_path)).expanduser()
    if place.suffix == ".gguf":
        return model.dtype
    if place.is_dir():
        return _from_headers(place) or model.dtype
    meta_model(model)  # brings config.json here
    config = try_to_load_from_cache(str(place), "config.json", revision=model.revision)
    content = json.loads(Path(config).read_text(encoding="utf-8")) if isinstance(config, str) else {}
    named = str(content.get("dtype") or content.get("torch_dtype"))
    return named if named in _NAMES.values() else "float32"


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast every floating-point parameter, and no buffer: tables made by code, as RoPE's, stay in float32.

    `model.to(dtype)` rounds those too, and then the model answers differently from what a checkpoint of it loads to.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _from_headers(folder: Path) -> str | None:
    counts: Counter[str] = Counter()
    try:
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # not a dictionary
                    piece = tensors.get_slice(name)
                    counts[piece.get_dtype()] += math.prod(piece.get_shape())
    except (SafetensorError, OSError):
        return None  # loading the weights says what is wrong with the file
    known = {kind: size for kind, size in counts.items() if kind in _NAMES}
    return _NAMES[max(known, key=lambda kind: known[kind])] if known else None
