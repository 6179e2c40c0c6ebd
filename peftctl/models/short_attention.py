"""Attention of short rows on CPUs: four matrix products where the library's kernel walks over blocks.

    P = softmax(s Q K^T + M),   O = P V

The kernel behind sdpa never holds (seq, seq) numbers, which pays for long rows. For rows of up to 1024 tokens in
bfloat16 plain products are two to three times as fast on CPUs, backward most of all (scripts/bench/README.md). Of rows
of up to 512 tokens P is kept between the passes; of longer ones only Q, K and V, and backward makes P again. Scores are
rounded to the type of Q before the softmax, as in the library's `eager`, which computes them in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LONGEST = 1024
"""Tokens of a row; beyond, the (seq, seq) numbers no longer fit into the caches."""
KEEPS = 512
"""Tokens of a row up to which P is kept: the rows of a pass then have about as many numbers of it as of the other
activations of a block, or fewer, and to make it again takes a third of the attention's time."""


@contextmanager
def short_rows() -> Iterator[None]:
    """Let modules that attend by sdpa take `attend` for a while, forward and backward, checkpointed blocks included."""
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as the library's sdpa does, by plain products where they are faster.

    Args:
        module: The attention layer.
        query: (batch, heads, seq, d).
        key: (batch, h_kv, seq, d).
        value: (batch, h_kv, seq, d_v).
        attention_mask: (batch or 1, 1, seq, seq), True or 0 where a key is seen; None masks the future in causal
            layers.
        dropout: Of the attention's weights.
        scaling: s; None takes 1 / sqrt(d).
        is_causal: Whether the layer is; None asks the module.
        options: Of further kinds of attention, which go to sdpa.

    Returns:
        (batch, seq, heads, d_v), and no weights.
    """
    if dropout or options.get("position_bias") is not None or not _faster(query, key, attention_mask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **options)
    if attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        length = query.shape[2]
        attention_mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=query.device).tril_()
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    output = Products.apply(query, key, value, _added(attention_mask, query.dtype), scale)
    return output.transpose(1, 2).contiguous(), None


def _faster(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> bool:
    if query.device.type != "cpu" or query.dtype != torch.bfloat16 or not torch.is_grad_enabled():
        return False
    length = query.shape[2]
    return key.shape[2] == length <= LONGEST and (mask is None or mask.shape[1:] == (1, length, length))


def _added(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Return a mask as what is added to scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    # Not the lowest number: a score on top of it must not make the whole row of a padding token infinite.
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min / 2)


class Products(torch.autograd.Function):
    """softmax(s Q K^T + M) V for queries that share keys in groups of heads, as (batch h_kv) products of matrices."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """Return O, (batch, heads, seq, d_v).

        Args:
            ctx: The library's.
            query: (batch, heads, seq, d).
            key: (batch, h_kv, seq, d).
            value: (batch, h_kv, seq, d_v).
            mask: (batch or 1, 1, seq, seq), added to the scores; None adds nothing.
            scale: s.
        """
        weights = _weights(query, key, mask, scale)
        kept = weights if query.shape[2] <= KEEPS else None
        ctx.save_for_backward(query, key, value, mask, kept)
        ctx.scale = scale
        return torch.bmm(weights, value.flatten(0, 1)).view(*query.shape[:3], value.shape[3])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Return dQ = s dS K, dK = s dS^T Q and dV = P^T dO, with dP = dO V^T and dS = P (dP - Σ P dP)."""
        query, key, value, mask, kept = ctx.saved_tensors
        weights = _weights(query, key, mask, ctx.scale) if kept is None else kept
        q, k, v = _by_key_head(query, key), key.flatten(0, 1), value.flatten(0, 1)
        upstream = _by_key_head(upstream, key)
        d_value = torch.bmm(weights.transpose(1, 2), upstream)
        d_scores = torch.bmm(upstream, v.transpose(1, 2))
        d_scores = torch._softmax_backward_data(d_scores, weights, -1, weights.dtype)
        d_query = torch.bmm(d_scores, k).mul_(ctx.scale)
        d_key = torch.bmm(d_scores.transpose(1, 2), q).mul_(ctx.scale)
        return d_query.view(query.shape), d_key.view(key.shape), d_value.view(value.shape), None, None


def _by_key_head(states: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return (batch h_kv, group seq, d) of (batch, heads, seq, d): what attends to the same keys, one under another."""
    return states.reshape(key.shape[0] * key.shape[1], -1, states.shape[3])


def _weights(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Return P, (batch h_kv, group seq, seq)."""
    q, k = _by_key_head(query, key), key.flatten(0, 1)
    scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale)
    if mask is not None:
        batch, length = query.shape[0], query.shape[2]
        scores.view(batch, -1, length, length).add_(mask)
    return torch.softmax(scores, dim=-1)
