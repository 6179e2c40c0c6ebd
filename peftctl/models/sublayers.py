"""Where adapters of a whole sublayer or block read and write: entries of feed-forward parts, ends of blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from peftctl.errors import UsageError
from peftctl.models.anatomy import places, sublayer_ends, widths

_STREAM = frozenset({
    "bloom", "falcon", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "gptj",
    "granite", "llama", "mistral", "mpt", "olmo", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3", "smollm3",
    "stablelm", "starcoder2",
})  # fmt: skip
"""Architectures whose blocks return the residual stream, read in their forward passes."""
_STREAM_PARTS = frozenset({"t5", "mt5", "umt5"})
"""Those whose blocks are lists of sublayers, each of which returns the residual stream."""
_NORMS = {
    "bart": "final_layer_norm",
    "bert": "output.LayerNorm",
    "camembert": "output.LayerNorm",
    "distilbert": "output_layer_norm",
    "electra": "output.LayerNorm",
    "roberta": "output.LayerNorm",
    "xlm-roberta": "output.LayerNorm",
}
"""Architectures whose blocks end with a LayerNorm of the sum of stream and sublayer -> its name in a block."""


def feed_forwards(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return the last linear layer of every feed-forward part, and the first of those that read its input.

    Args:
        model: Any transformer.
        names: Of its linear layers, in the model's order.

    Returns:
        Name of the last layer -> name of the first.

    Raises:
        UsageError: As `sublayer_ends`.
    """
    names = list(names)
    width = model.config.get_text_config().hidden_size  # type: ignore[union-attr,operator]
    ends = sublayer_ends(model, names)["mlp"]
    parts: dict[str, list[str]] = {}
    for place in places(model, names):
        if place.attention is None and widths(model.get_submodule(place.name))[0] == width:
            parts.setdefault(place.block, []).append(place.name)
    blocks = {place.name: place.block for place in places(model, ends)}
    return {end: parts[blocks[end]][0] for end in ends}


def block_ends(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the module with which every block ends: what returns the residual stream, or the last LayerNorm.

    Args:
        model: Any transformer.
        names: Of its linear layers.

    Raises:
        UsageError: It is not known of the architecture whether its blocks end with a norm.
    """
    config: Any = model.config
    kind = config.model_type
    normed = _NORMS.get(kind)
    if kind == "opt" and not config.do_layer_norm_before:
        normed = "final_layer_norm"
    if normed is None and kind not in _STREAM | _STREAM_PARTS:
        raise UsageError(
            f"where the blocks of the {kind} architecture add to the residual stream is not known here; "
            "take a variant behind linear layers, and give method.target_modules"
        )
    found = dict.fromkeys(place.block for place in places(model, names) if place.attention is not None)
    if kind in _STREAM_PARTS:
        return [f"{block}.layer.{len(model.get_submodule(block).layer) - 1}" for block in found]  # type: ignore[arg-type]
    return [f"{block}.{normed}" if normed else block for block in found]


def depths(model: nn.Module, names: Iterable[str], targets: Iterable[str]) -> tuple[dict[str, int], int]:
    """Return how many blocks are run before the one that a module belongs to; the decoder's follow the encoder's.

    Args:
        model: Any transformer.
        names: Of its linear layers, in the model's order.
        targets: Modules of blocks, or blocks.

    Returns:
        Target -> depth from 0, and how many blocks the model has.

    Raises:
        UsageError: A target is in no block.
    """
    blocks = list(dict.fromkeys(place.block for place in places(model, names) if place.attention is not None))
    found = {}
    for target in targets:
        depth = next((i for i, block in enumerate(blocks) if (target + ".").startswith(block + ".")), None)
        if depth is None:
            raise UsageError(f"method.target_modules: {target} is outside of the blocks, which alone have a depth")
        found[target] = depth
    return found, len(blocks)
