"""What a run will need, in bytes, from the model's shapes: weights, gradients, optimizer, activations, logits.

Nothing is loaded. The activation term counts the tensors that autograd keeps in one decoder block (see `_block_bytes`);
it was derived, not fitted; runs report what they measured beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftctl.errors import UsageError
from peftctl.recipe.schema import Recipe

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Optimizer state per trainable parameter: two float32 moments; two 8-bit ones; factored; none.
OPTIMIZER_BYTES = {
    "adamw": 8,
    "paged_adamw_32bit": 8,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "adafactor": 0,
    "sgd": 0,
}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one process at the peak of a training step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    process: int
    """The interpreter and its libraries, where they share the memory with the model (CPU)."""

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.process


def plan_memory(
    recipe: Recipe, model: Any, lengths: Sequence[int], supervised: Sequence[int], *, process_bytes: int
) -> MemoryPlan:
    """Plan the peak of a step over the longest rows.

    Args:
        recipe: The run's recipe.
        model: With the method applied, on the meta device.
        lengths: Tokens of each training row.
        supervised: Supervised tokens of each training row.
        process_bytes: Memory in use before the model is there, or 0 where the model lives on a device of its own.
    """
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() * (4 if p.requires_grad else p.element_size()) for p in model.parameters())
    longest = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)[: recipe.train.batch_size]
    tokens = len(longest) * max(lengths[i] for i in longest)
    compute = DTYPE_BYTES[recipe.model.dtype]
    config = model.config
    layers = _layers_with_graph(model)
    block = _block_bytes(config.hidden_size, _feed_forward(config), compute)
    if recipe.train.gradient_checkpointing:  # one block at a time is recomputed; its input is kept for each
        activations = tokens * (block + layers * config.hidden_size * compute)
    else:
        activations = tokens * block * layers
    positions = sum(supervised[i] for i in longest)
    logits = positions * config.vocab_size * 2 * compute  # themselves and their gradient
    return MemoryPlan(
        weights=weights,
        gradients=trainable * 4,
        optimizer=trainable * OPTIMIZER_BYTES[recipe.train.optimizer],
        activations=activations,
        logits=logits,
        process=process_bytes,
    )


def _block_bytes(hidden: int, feed_forward: int, compute: int) -> int:
    """Return bytes a token that a gated decoder block keeps for its backward pass.

    Two norms keep a float32 copy of their input and their output; attention keeps query, key, value and output; the
    feed-forward part keeps the gate before and after its activation, the up projection and their product.
    """
    norms = 2 * hidden * (4 + compute)
    attention = 4 * hidden * compute
    return norms + attention + 4 * feed_forward * compute


def _layers_with_graph(model: Any) -> int:
    """Return the number of blocks from the first with a trainable tensor to the last: below it nothing is kept."""
    from peftctl.models.anatomy import block_list

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    blocks = block_list(base)[1]
    first = next((i for i, block in enumerate(blocks) if any(p.requires_grad for p in block.parameters())), len(blocks))
    if any(p.requires_grad for p in base.get_input_embeddings().parameters()):
        first = 0
    return len(blocks) - first


def _feed_forward(config: Any) -> int:
    """Return the width of the feed-forward part, under the names that configurations use."""
    for name in ("intermediate_size", "ffn_dim", "n_inner", "d_ff"):
        width = getattr(config, name, None)
        if width:
            return width
    return 4 * config.hidden_size


def parse_bytes(text: str) -> int:
    """Return the bytes of `24GB`, `16 GiB` or a bare number.

    Raises:
        UsageError: It is none of these.
    """
    number = text.strip().upper().replace(" ", "")
    for unit, factor in sorted(_UNITS.items(), key=lambda item: -len(item[0])):
        if number.endswith(unit):
            number, scale = number[: -len(unit)], factor
            break
    else:
        scale = 1
    try:
        return int(float(number) * scale)
    except ValueError:
        raise UsageError(f"--memory: expected a size such as 24GB, got '{text}'") from None
