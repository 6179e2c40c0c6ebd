"""Where a transformer attends: the modules that call the library's attention interface, found by running tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from peftctl.errors import UsageError

_PROBE = "peftctl_probe"
_KNOWN = ("sdpa", "eager")
"""Implementations whose masks have a place for every pair of tokens, so that keys can be put before them."""


@dataclass(frozen=True)
class Attention:
    """A module that attends.

    Args:
        name: Of the module.
        kind: `encoder` where tokens see those behind them, `decoder` where they don't, `cross` where they see another
            sequence.
        stack: Name of the module that holds the blocks.
        heads: h_kv, key-value heads.
        key_dim: Width of a key in a head.
        value_dim: Width of a value in a head.
    """

    name: str
    kind: Literal["encoder", "decoder", "cross"]
    stack: str
    heads: int
    key_dim: int
    value_dim: int

    @property
    def row(self) -> int:
        """Numbers that a token has in keys and values, h_kv (d_k + d_v)."""
        return self.heads * (self.key_dim + self.value_dim)


def attentions(model: PreTrainedModel) -> list[Attention]:
    """Return the modules that attend, in the order in which they run; weights may be missing.

    Raises:
        UsageError: The architecture's attention does not go through the library's interface, or goes to a kernel whose
            masks leave no room for further keys.
    """
    kind = model.config.model_type
    used = model.config.get_text_config()._attn_implementation
    if used not in _KNOWN:
        raise UsageError(
            f"model.attn_implementation: expected sdpa or eager, to put keys before those of the text; got {used}"
        )
    found: dict[str, Attention] = {}
    names = {id(module): name for name, module in model.named_modules()}
    what = f"method.name: the {kind} architecture takes no keys and values of a method's own"
    try:
        for module, query, key, value, options in _calls(model):
            name = names[id(module)]
            found.setdefault(name, _attention(model, module, name, query, key, value))
            if options.get("s_aux") is not None:
                raise UsageError(f"{what}: its attention has sinks")
    except (TypeError, ValueError, AttributeError, NotImplementedError, RuntimeError, KeyError) as error:
        raise UsageError(f"{what}: {type(error).__name__} where two tokens ran through it") from error
    if not found:
        raise UsageError(f"{what}: its attention does not go through the library's interface")
    return list(found.values())


def stack_of(model: nn.Module, name: str) -> str:
    """Return the name of the module that holds the list of blocks in which a module is."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:depth])), nn.ModuleList):
            return ".".join(parts[: depth - 1])
    raise UsageError(f"{name} is in no list of blocks")


def _attention(
    model: nn.Module, module: nn.Module, name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> Attention:
    takes = inspect.signature(module.forward).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in takes) or not isinstance(vars(module).get("config"), PreTrainedConfig):
        raise TypeError(f"{name} hands nothing on to its attention")
    crossed = query.shape[2] != key.shape[2]
    # As the library's sdpa reads it; what says nothing is causal.
    causal = bool(getattr(module, "is_causal", True))
    return Attention(
        name=name,
        kind="cross" if crossed else "decoder" if causal else "encoder",
        stack=stack_of(model, name),
        heads=key.shape[1],
        key_dim=key.shape[3],
        value_dim=value.shape[3],
    )


_Call = tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]


@torch.no_grad()
def _calls(model: PreTrainedModel) -> list[_Call]:
    """Run two tokens, in an encoder-decoder three behind them; return what was asked to attend, and with what."""
    calls: list[_Call] = []

    def record(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        calls.append((module, query, key, value, options))
        batch, heads, length, _ = query.shape
        return query.new_zeros(batch, length, heads, value.shape[3]), None

    AttentionInterface.register(_PROBE, record)
    AttentionMaskInterface.register(_PROBE, sdpa_mask)
    if model.config.is_encoder_decoder:
        ids = torch.zeros(1, 3, dtype=torch.long, device=model.device)
        # Masks of our own: BART looks at the values of the one that it would make, and shapes have none.
        seen = torch.ones(1, 1, 3, 3, dtype=torch.bool, device=model.device).tril()
        inputs: dict[str, Any] = {"input_ids": ids[:, :2], "decoder_input_ids": ids, "decoder_attention_mask": seen}
    else:
        # No tokens, among which GPT-2 looks for padding.
        table: Any = model.get_input_embeddings()
        inputs = {"inputs_embeds": table.weight.new_zeros(1, 2, table.embedding_dim)}
        if "past_key_values" in inspect.signature(model.base_model.forward).parameters:
            # Without a cache the mask looks for rows packed into one, in the values of positions.
            inputs["past_key_values"] = DynamicCache()
    with _attending_by(model, _PROBE):
        model.base_model(**inputs)
    return calls


@contextmanager
def _attending_by(model: nn.Module, implementation: str) -> Iterator[None]:
    """Let every module of a model attend by an implementation for a while."""
    configs = {id(c): c for m in model.modules() if isinstance(c := vars(m).get("config"), PreTrainedConfig)}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation_internal = implementation
        yield
    finally:
        for config, used in before:
            config._attn_implementation_internal = used
