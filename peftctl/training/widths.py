"""Estimates from a model's widths alone: which batch is the widest, and what a step needs where it can't be run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peftctl.data.batching import GroupedBatches
from peftctl.data.encode import IGNORED, EncodedRow
from peftctl.data.table import sizes_of
from peftctl.errors import UsageError
from peftctl.models.cross_entropy import CHUNK
from peftctl.recipe.schema import Recipe
from peftctl.training.passes import cut
from peftctl.training.step_bytes import StepBytes, StepSettings, stacks

_EPOCHS = 3
"""Epochs whose batches are looked at; later ones draw from the same rows."""
_NAMES = {
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "vocabulary": ("vocab_size", "padded_vocab_size"),
}
_FEED_FORWARD = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "encoder_ffn_dim")


@dataclass(frozen=True)
class Widths:
    """The sizes of a transformer: width, feed-forward width, blocks (of all stacks), tokens."""

    hidden: int
    feed_forward: int
    layers: int
    vocabulary: int


def widths(config: Any) -> Widths:
    """Read a configuration's sizes under the names that architectures use.

    Raises:
        UsageError: One of them has none of these names.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = {}
    for width, names in _NAMES.items():
        value = next((v for name in names if (v := getattr(config, name, None))), None)
        if value is None:
            raise UsageError(
                f"the {config.model_type} architecture can't be planned: its configuration has none of "
                f"{', '.join(names)}"
            )
        found[width] = value
    if getattr(config, "is_encoder_decoder", False):
        decoder = getattr(config, "decoder_layers", None) or getattr(config, "num_decoder_layers", None)
        found["layers"] += decoder or found["layers"]
    inner = next((v for name in _FEED_FORWARD if (v := getattr(config, name, None))), 4 * found["hidden"])
    return Widths(feed_forward=inner, **found)


def widest_rows(
    rows: Sequence[EncodedRow], recipe: Recipe, model: Any, processes: int, tokens: int | None = None
) -> tuple[list[EncodedRow], bool]:
    """Return the rows of the pass that needs the most memory among those that the run will take.

    Args:
        rows: The training rows.
        recipe: The run's.
        model: Gives widths.
        processes: That train together.
        tokens: Of a pass, see `passes.py`.

    Returns:
        The rows, and whether they are less than their micro-batch.
    """
    train = recipe.train
    sizes = sizes_of(rows)
    lengths = [size.inputs for size in sizes]
    vocabulary, hidden = model.get_input_embeddings().weight.shape
    blocks = sum(len(stack) for stack in stacks(model))
    kept = hidden * blocks * (1 if train.gradient_checkpointing else 16)

    def need(part: Sequence[int]) -> int:
        width = len(part) * max(sizes[i].inputs for i in part)
        return width * kept + 2 * vocabulary * sum(sizes[i].supervised for i in part)

    # Neighbours in length are dealt to the processes in order, the longest to the last.
    sampler = GroupedBatches(
        lengths, train.batch_size, train.gradient_accumulation, train.seed, processes, rank=processes - 1
    )
    epochs = _EPOCHS if train.max_steps else min(math.ceil(train.epochs), _EPOCHS)
    micro_steps = train.max_steps * train.gradient_accumulation if train.max_steps else None
    batches = itertools.islice(_epochs(sampler, epochs), micro_steps)
    micro_batches = ((batch, cut([sizes[i].tokens for i in batch], tokens)) for batch in batches if batch)
    passes = ((batch[part], len(parts) > 1) for batch, parts in micro_batches for part in parts)
    widest, several = max(passes, key=lambda one: need(one[0]))
    return [rows[i] for i in widest], several


def _epochs(sampler: GroupedBatches, epochs: int) -> Iterable[list[int]]:
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        yield from sampler


def step_bytes_by_widths(model: Any, batch: Mapping[str, torch.Tensor], settings: StepSettings) -> StepBytes:
    """Estimate the bytes of a step of a model that can't be run here, as those of a Llama of its widths.

    A gated block keeps two norms in float32 with their outputs; query, key, value and output; and four tensors of the
    feed-forward part. The logits, their gradient and a piece of them in float32 come on top.

    Raises:
        UsageError: The configuration's widths can't be read.
    """
    size = widths(model.config)
    compute = (settings.autocast or model.dtype).itemsize
    tokens = batch["input_ids"].numel()
    positions = int((batch["labels"] != IGNORED).sum())
    block = tokens * (2 * size.hidden * (4 + compute) + 4 * size.hidden * compute + 4 * size.feed_forward * compute)
    boundary = tokens * size.hidden * compute
    activations = block + size.layers * boundary if settings.checkpointing else size.layers * block
    logits = size.vocabulary * positions
    widened = min(logits, CHUNK["gpu" if settings.on_gpu else "cpu"])
    gradients = (
        0 if settings.accumulates else sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    )
    return StepBytes(
        activations=activations, logits=2 * logits * compute + 2 * widened * 4, gradients=gradients, heap=0
    )
