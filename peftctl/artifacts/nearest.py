"""Which vocabulary tokens the trained tokens of a soft prompt lie nearest to (Lester et al. 2021, section 7)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from peftctl.artifacts.checks import ADAPTER_WEIGHTS, read_keys
from peftctl.artifacts.load import base_section
from peftctl.artifacts.locate import ADAPTER_CONFIG, Artefact
from peftctl.artifacts.sides import require_base
from peftctl.errors import ArtifactError
from peftctl.models.stored import StoredWeights

_EMBEDDINGS = "prompt_embeddings"
_CHUNK = 8192
"""Rows of the embedding matrix that are looked at together, in float64."""


@dataclass(frozen=True)
class Neighbours:
    """The vocabulary tokens nearest to one virtual token, nearest first.

    Args:
        norm: Length of the virtual token's embedding.
        cosine: (token id, cosine of the angle).
        l2: (token id, Euclidean distance).
    """

    norm: float
    cosine: tuple[tuple[int, float], ...]
    l2: tuple[tuple[int, float], ...]


def prompts(folder: Path) -> dict[str, torch.Tensor]:
    """Return the virtual tokens of an adapter, (tokens, d) float32; of a multitask prompt one for each task.

    Raises:
        ArtifactError: The file is damaged, or holds no prompt.
    """
    file = folder / ADAPTER_WEIGHTS
    if _EMBEDDINGS not in read_keys(file):
        raise ArtifactError(f"{file}: holds no {_EMBEDDINGS}, so it is not the prompt that {ADAPTER_CONFIG} says")
    tensors: Mapping[str, torch.Tensor] = load_file(file)
    shared = tensors[_EMBEDDINGS].float()
    if "prefix_task_cols" not in tensors:
        return {"": shared}
    # Wang et al. 2023 (arXiv 2303.02861): P_task = P * (u v^T), u: (tokens, rank), v: (rank, d).
    factors = tensors["prefix_task_cols"].float() @ tensors["prefix_task_rows"].float()
    return {f"task {i}": shared * factor for i, factor in enumerate(factors)}


def token_table(artefact: Artefact) -> torch.Tensor:
    """Return the input embedding of an adapter's base, (vocabulary, d) float32, and read nothing else of it.

    Raises:
        ArtifactError: The base is another one than the adapter was trained on.
    """
    stored = StoredWeights(base_section(artefact))
    require_base(artefact, stored)
    embedding = stored.model.get_input_embeddings()
    return stored.get(next(name for name, module in stored.model.named_modules() if module is embedding) + ".weight")


def nearest(prompt: torch.Tensor, table: torch.Tensor, k: int) -> list[Neighbours]:
    """Return the k vocabulary tokens nearest to each virtual token, by angle and by distance.

    Args:
        prompt: Virtual tokens, (tokens, d).
        table: Vocabulary, (vocabulary, d).
        k: How many; not more than there are.

    Raises:
        ArtifactError: The two have another d.
    """
    if prompt.shape[1] != table.shape[1]:
        raise ArtifactError(
            f"the prompt's tokens have {prompt.shape[1]} dimensions, the base's embedding has {table.shape[1]}; "
            "the adapter is of another base"
        )
    tokens = prompt.double()
    cosines, distances = [], []
    for chunk in table.split(_CHUNK):
        rows = chunk.double()
        product = tokens @ rows.T
        lengths = tokens.norm(dim=1)[:, None] * rows.norm(dim=1)
        cosines.append(torch.where(lengths > 0, product / lengths, 0.0))
        squares = tokens.square().sum(1)[:, None] + rows.square().sum(1) - 2 * product
        distances.append(squares.clamp_min(0.0).sqrt())
    k = min(k, len(table))
    angle = torch.cat(cosines, dim=1).topk(k)
    distance = torch.cat(distances, dim=1).topk(k, largest=False)
    return [
        Neighbours(
            norm=float(token.norm()),
            cosine=tuple(zip(angle.indices[i].tolist(), angle.values[i].tolist(), strict=True)),
            l2=tuple(zip(distance.indices[i].tolist(), distance.values[i].tolist(), strict=True)),
        )
        for i, token in enumerate(tokens)
    ]
