"""Trained keys and values of an attention layer, before those of the text; Li & Liang 2021 (arXiv 2101.00190).

    softmax(q [P_k; K]^T s + [0; mask]) [P_v; V],   P_k: (n, d_k), P_v: (n, d_v) a key-value head

With a gate g_t of the layer's input, the scores of the prefix are s g_t q_t . P_k and its values g_t P_v (UniPELT).

Any attention that goes through the library's interface takes one: of a decoder, an encoder, or crossed. The prefix is
seen from every position, has none itself (no rotation, no relative bias), and is not in the cache, which stays the
base's. Where no adapter is active the base's attention runs, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from peftctl.tuners._parts import Part

IMPLEMENTATION = "peftctl_kv_prefix"
"""What the library calls `prefix_attention`."""


@dataclass
class PrefixSettings:
    """How a prefix is saved.

    Args:
        tokens: n.
        heads: h_kv.
        key_dim: d_k.
        value_dim: d_v.
        width: d, of the layer's input.
        hidden: m, width of the network that makes it; None trains the table itself.
        std: Of the table's normal distribution.
    """

    tokens: int
    heads: int
    key_dim: int
    value_dim: int
    width: int
    hidden: int | None = None
    std: float = 1.0


@dataclass(frozen=True)
class Prefix:
    """Of one forward pass: keys (h_kv, n, d_k), values (h_kv, n, d_v), and g, (batch, seq or 1, 1), or None."""

    keys: torch.Tensor
    values: torch.Tensor
    gate: torch.Tensor | None


class PrefixTable(nn.Module):
    """Keys and values (n, h_kv (d_k + d_v)), head by head; in training, maybe, W2 tanh(W1 E + b1) + b2."""

    def __init__(self, settings: PrefixSettings, gate: nn.Module | None = None) -> None:
        super().__init__()
        self.shape = (settings.heads, settings.key_dim, settings.value_dim)
        row, read = settings.heads * (settings.key_dim + settings.value_dim), settings.heads * settings.key_dim
        hidden = settings.hidden
        self.table = nn.Parameter(torch.empty(settings.tokens, row if hidden is None else read))
        nn.init.normal_(self.table, std=settings.std)
        self.network: nn.Sequential | None = None
        if hidden is not None:
            self.network = nn.Sequential(nn.Linear(read, hidden), nn.Tanh(), nn.Linear(hidden, row))
        self.gate = gate

    def rows(self) -> torch.Tensor:
        """Return the keys and values, (n, h_kv (d_k + d_v))."""
        return self.table if self.network is None else self.network(self.table)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return what makes a `Prefix`, in the type of the layer's input x, (batch, seq, d).

        A tuple, in which ZeRO-3 finds the tensors before whose backward pass it must have the table again.
        """
        heads, key_dim, value_dim = self.shape
        rows = self.rows().to(x.dtype).unflatten(1, (heads, key_dim + value_dim)).transpose(0, 1)
        keys, values = rows.split([key_dim, value_dim], dim=2)
        # Copies: an engine may take the table back as soon as this module is done.
        return keys.clone(), values.clone(), None if self.gate is None else self.gate(x)

    @torch.no_grad()
    def flatten(self) -> None:
        """Keep what the network makes, and drop it."""
        self.table = nn.Parameter(self.rows().detach(), requires_grad=self.table.requires_grad)
        self.network = None


class KvPrefix(Part):
    """Stands at a module that attends: lets it attend with the prefix, through `prefix_attention`."""

    kind = "prefix"

    def __init__(self) -> None:
        super().__init__()
        self.configs: list[Any] = []
        """Of the calls that are under way, what to give back to the module afterwards."""

    def attach(self, target: nn.Module, model: nn.Module, settings: Any, key: str) -> None:
        """Stand before and behind every call of the module.

        Raises:
            ValueError: It attends by a kernel whose masks leave no room.
        """
        used = target.config._attn_implementation  # type: ignore[union-attr]
        if used not in ("sdpa", "eager"):
            raise ValueError(f"a prefix needs attn_implementation sdpa or eager, got {used}")
        self.handles = [
            target.register_forward_pre_hook(self.begin, with_kwargs=True),
            target.register_forward_hook(self.end, always_call=True),
        ]

    def make(self, target: nn.Module, settings: Any, gate: Callable[[int], nn.Module] | None) -> nn.Module:
        """Return a table of keys and values."""
        return PrefixTable(settings, None if gate is None else gate(settings.width))

    def begin(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hand the prefix on, and lead the module to `prefix_attention` by its own copy of a shared configuration."""
        self.configs.append(module.config)
        table = self.running()
        if table is None:
            return None
        states = args[0] if args else kwargs["hidden_states"]
        module.config = copy.copy(module.config)
        module.config._attn_implementation_internal = IMPLEMENTATION
        return args, {**kwargs, "kv_prefix": Prefix(*table(states))}

    def end(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        """Give the configuration back, also after an error."""
        if self.configs:
            module.config = self.configs.pop()


def prefix_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    kv_prefix: Prefix,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over [prefix; keys].

    A gate for each position would need another key for each query. It is the same to give every query twice the width:
    (q_t, g_t q_t) . (0, P_k) = g_t q_t . P_k, and (q_t, g_t q_t) . (K, 0) = q_t . K; likewise the values.

    Args:
        module: The attention layer.
        query: (batch, heads, queries, d_k).
        key: (batch, h_kv, seq, d_k).
        value: (batch, h_kv, seq, d_v).
        attention_mask: (batch or 1, heads or 1, queries, seq), True or 0 where a key is seen; None masks nothing, but
            the future in causal layers.
        dropout: Of the attention's weights.
        scaling: s; None takes 1 / sqrt(d_k).
        kv_prefix: What goes first.
        is_causal: Whether the layer is; None asks the module.
        position_bias: (1 or batch, heads, queries, seq), added to scores.
        softcap: c of scores c tanh(score / c), as in Gemma 2.
        options: Passed on to sdpa.

    Returns:
        (batch, queries, heads, d_v), and no weights.
    """
    tokens, queries = kv_prefix.keys.shape[1], query.shape[2]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if attention_mask is None and causal and queries > 1:
        attention_mask = torch.ones(1, 1, queries, key.shape[2], dtype=torch.bool, device=query.device).tril()
    if attention_mask is not None:
        attention_mask = functional.pad(attention_mask, (tokens, 0), value=attention_mask.dtype == torch.bool)
    if position_bias is not None:
        position_bias = functional.pad(position_bias, (tokens, 0))
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    gate, batch = kv_prefix.gate, len(key)
    prefix = [part.expand(batch, -1, -1, -1) for part in (kv_prefix.keys, kv_prefix.values)]
    text = [key, value]
    each = gate is not None and gate.shape[1] > 1
    if gate is not None and each:
        query = torch.cat([query, gate[:, None] * query], dim=3)
        prefix = [functional.pad(part, (part.shape[3], 0)) for part in prefix]
        text = [functional.pad(part, (0, part.shape[3])) for part in text]
    elif gate is not None:
        prefix = [gate[..., None] * part for part in prefix]
    key, value = (torch.cat(pair, dim=2) for pair in zip(prefix, text, strict=True))
    if softcap is not None:
        output = _capped(query, key, value, attention_mask, dropout if module.training else 0.0, scaling, softcap)
    else:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, False, position_bias, **options
        )
    if gate is not None and each:
        of_text, of_prefix = output.chunk(2, dim=3)
        output = of_text + gate[..., None] * of_prefix
    return output, None


def _capped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    mask: torch.Tensor | None, dropout: float, scaling: float, softcap: float,
) -> torch.Tensor:  # fmt: skip
    """Attend with capped scores, which sdpa does not know; arguments and result as in `prefix_attention`."""
    repeats = query.shape[1] // key.shape[1]
    scores = query @ repeat_kv(key, repeats).transpose(2, 3) * scaling
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = torch.where(mask, scores, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    weights = functional.dropout(scores.softmax(dim=-1, dtype=wide).to(query.dtype), dropout)
    return (weights @ repeat_kv(value, repeats)).transpose(1, 2).contiguous()


AttentionInterface.register(IMPLEMENTATION, prefix_attention)
