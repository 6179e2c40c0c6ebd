"""What a side network is made of: where the base's blocks are, and the same from a narrower configuration.

The narrow stack is of the base's own classes, so that whatever an architecture does in a block, the side does too. Its
blocks get the very arguments that the base's blocks were called with (masks, positions, rotary angles, the cache):
they depend on the width of a head, which the side keeps where there are angles, and not on the number of heads.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from peftctl.errors import UsageError
from peftctl.models.anatomy import block_list, norms

_FEED_FORWARD = ("intermediate_size", "ffn_dim", "n_inner")
"""What configurations call the width of the feed-forward part."""
_BIASES_OF_HEADS = frozenset({"alibi", "position_bias"})
"""Arguments of blocks that are made for the base's number of heads."""


@dataclass(frozen=True)
class Stack:
    """The decoder of a model.

    Args:
        name: Of the module that holds blocks and the final norm, in the model; "" for the model itself.
        blocks: Name of the list of blocks in that module.
        norm: Name of the final norm in that module.
    """

    name: str
    blocks: str
    norm: str

    def within(self, model: nn.Module) -> nn.Module:
        """Return the module in a model."""
        return model.get_submodule(self.name)

    def block_list(self, model: nn.Module) -> nn.ModuleList:
        """Return the blocks of a model."""
        blocks = self.within(model).get_submodule(self.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @property
    def target(self) -> str:
        """The final norm's name in the model."""
        return f"{self.name}.{self.norm}".removeprefix(".")


def find_stack(model: Any) -> Stack:
    """Return where the decoder of a model is.

    Raises:
        UsageError: It has no single list of blocks, its blocks are not of one kind or not closed by a norm, or they
            need what a narrower block can't be given.
    """
    config = model.config
    if config.is_encoder_decoder:
        raise unsupported(config, "it has an encoder")
    path, blocks = block_list(model)
    name, _, last = path.rpartition(".")
    holder = model.get_submodule(name)
    closing = [n for n, _ in norms(holder).items() if "." not in n]
    if not isinstance(holder, PreTrainedModel) or not closing:
        raise unsupported(config, "no norm stands behind its last block")
    if len({type(block) for block in blocks}) > 1 or any(p.dim() > 2 for p in blocks.parameters()):
        raise unsupported(config, "its blocks are not plain")
    if biased := sorted(_BIASES_OF_HEADS & set(inspect.signature(type(blocks[0]).forward).parameters)):
        raise unsupported(config, f"its blocks take {biased[0]}, made for each head")
    return Stack(name, last, closing[-1])


def narrow_config(model: Any, stack: Stack, reduction: int) -> Any:
    """Return the configuration of the side: d / r wide, with fewer heads.

    Heads stay as wide as the base's where d / r is a multiple of that, or where a head's width is a key of its own;
    else there are as many as divide d / r, at most the base's.

    Args:
        model: The base, with or without side networks.
        stack: Of it.
        reduction: r.

    Raises:
        UsageError: d / r is no whole number, or heads of the base's width don't fill it although they must.
    """
    base = model.config.get_text_config()
    d, heads = base.hidden_size, base.num_attention_heads
    if d % reduction:
        raise UsageError(
            f"method.reduction: got {reduction}, which does not divide the base's width {d}; take a divisor"
        )
    width = d // reduction
    config = copy.deepcopy(base)
    head = getattr(base, "head_dim", None) or d // heads
    if hasattr(base, "head_dim"):
        narrow, config.head_dim = max(1, width // head), head
    elif width % head == 0:
        narrow = width // head
    elif _has_angles(stack.block_list(model), base):
        raise UsageError(
            f"method.reduction: got {reduction}: {width} dimensions can't be divided into heads of {head}, which the "
            f"{base.model_type} architecture needs; lower it"
        )
    else:
        narrow = next(n for n in range(min(heads, width), 0, -1) if width % n == 0)
    config.hidden_size, config.num_attention_heads = width, narrow
    if hasattr(base, "num_key_value_heads"):
        share = max(1, heads // base.num_key_value_heads)
        wanted = max(1, narrow // share)
        config.num_key_value_heads = next(n for n in range(wanted, 0, -1) if narrow % n == 0)
    for key in _FEED_FORWARD:
        if inner := getattr(base, key, None):
            setattr(config, key, max(1, inner // reduction))
    if hasattr(base, "word_embed_proj_dim"):
        config.word_embed_proj_dim = width
    config.vocab_size, config.pad_token_id = 1, None
    return config


def narrow_stack(model: Any, stack: Stack, reduction: int) -> tuple[nn.ModuleList, nn.Module]:
    """Return the blocks and the final norm of the base's stack at the side's width, as the library draws new ones.

    Raises:
        UsageError: The architecture can't be made narrower, see `find_stack` and `narrow_config`.
    """
    small = type(stack.within(model))(narrow_config(model, stack, reduction))  # type: ignore[call-arg]
    blocks, norm = small.get_submodule(stack.blocks), small.get_submodule(stack.norm)
    assert isinstance(blocks, nn.ModuleList)
    return blocks, norm


def kept_layers(depth: int, every: int) -> list[int]:
    """Return which blocks have a rung: every k-th, counted from the last."""
    return sorted(range(depth - 1, -1, -every))


def _has_angles(blocks: nn.ModuleList, config: Any) -> bool:
    """Tell whether blocks are given rotary angles, or make them, for heads of the base's width."""
    named = {name for module in blocks[0].modules() for name in inspect.signature(type(module).forward).parameters}
    return "position_embeddings" in named or getattr(config, "rotary_dim", None) is not None


def unsupported(config: Any, reason: str) -> UsageError:
    """Return the error for an architecture that has no side network."""
    return UsageError(
        f"method: ladder_side_tuning can't make a side network of the {config.model_type} architecture: {reason}; "
        "take another method, e.g. lora"
    )
