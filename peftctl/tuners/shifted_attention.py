"""Shifted sparse attention (S2-Attn), Chen et al. 2023 (arXiv 2309.12307), section 3.2: causal attention in groups.

With groups of G tokens, half of the heads attend inside of [0, G), [G, 2G), ..., the others inside of [0, G/2),
[G/2, 3G/2), ..., so that what one group knows flows into the next. The authors' first code rolls the second half of the
heads by G/2 *around the end*, which lets the first G/2 tokens look at the last ones; segments, as in their second code,
do not.

It serves training only: modules in evaluation mode get the library's sdpa, bit for bit. No (seq, seq) tensor is made in
training, so time and memory grow linearly with the row.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


def register(group: int) -> str:
    """Make the library know the attention with groups of so many tokens; return its name.

    The size is a part of the name, so that neither modules nor configurations, which are saved, have to carry it.
    """
    name = f"peftctl_shifted_{group}"
    AttentionInterface.register(name, partial(shifted_attention, group=group))
    AttentionMaskInterface.register(name, padding_mask)
    return name


def padding_mask(
    batch_size: int, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **options: Any
) -> torch.Tensor | None:
    """Return sdpa's mask; where gradients are wanted, (batch, 1, 1, seq): which tokens are no padding, or None.

    Causal attention needs no more to train rows that are padded on the right: nothing real looks at what is behind it.
    """
    if attention_mask is None or not torch.is_grad_enabled() or q_length != kv_length:
        return sdpa_mask(batch_size, q_length, kv_length, attention_mask=attention_mask, **options)
    return None if attention_mask.all() else attention_mask[:, None, None, :]


def shifted_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    group: int,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend in groups where the module trains, and as sdpa does where it does not.

    A row that one group holds, counted without its padding, gets full attention in all heads. So what a row's tokens
    see does not depend on the rows beside it.

    Args:
        module: The attention layer.
        query: (batch, heads, seq, d). The first heads // 2 are not shifted.
        key: (batch, heads of keys, seq, d); repeated for the queries' heads before these are divided.
        value: As key.
        attention_mask: Of `padding_mask`. Rows that train are padded on the right.
        dropout: Of the attention's weights.
        scaling: Of the products; None takes 1 / sqrt(d).
        group: G, tokens, even.
        options: Passed on to sdpa.

    Returns:
        (batch, seq, heads, d), and no weights.
    """
    length = query.shape[2]
    trains = module.training and key.shape[2] == length
    if not trains or length <= group:
        mask = None if trains else _full_mask(attention_mask, length)
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **options)
    repeats = query.shape[1] // key.shape[1]
    heads = query, repeat_kv(key, repeats), repeat_kv(value, repeats)
    attend = partial(scaled_dot_product_attention, dropout_p=dropout, scale=scaling, is_causal=True)
    half = query.shape[1] // 2
    straight, shifted = ([part[:, where] for part in heads] for where in (slice(half), slice(half, None)))
    outputs = [_in_groups(straight, group, attend), _in_shifted_groups(shifted, group, attend)]
    if attention_mask is not None:
        first = attend(*(part[:, :, :group] for part in shifted))
        short = attention_mask[:, :, -1:].sum(-1, keepdim=True) <= group
        outputs[1] = torch.cat([torch.where(short, first, outputs[1][:, :, :group]), outputs[1][:, :, group:]], dim=2)
    return torch.cat(outputs, dim=1).transpose(1, 2).contiguous(), None


def _in_groups(heads: list[torch.Tensor], group: int, attend: Any) -> torch.Tensor:
    """Attend causally inside of [0, G), [G, 2G), ...; the last group may be shorter.

    Args:
        heads: Queries, keys and values, (batch, heads, seq, d).
        group: G.
        attend: Causal attention.
    """
    batch, count, length, _ = heads[0].shape
    groups = -(-length // group)
    # Zeros fill the last group: they stand behind every token of it, so that no token looks at them.
    filled = (pad(part, (0, 0, 0, groups * group - length)) for part in heads)
    out = attend(*(part.reshape(batch, count * groups, group, part.shape[-1]) for part in filled))
    return out.reshape(batch, count, groups * group, out.shape[-1])[:, :, :length]


def _in_shifted_groups(heads: list[torch.Tensor], group: int, attend: Any) -> torch.Tensor:
    """Attend causally inside of [0, G/2), [G/2, 3G/2), ...; arguments as `_in_groups`."""
    shift = group // 2
    start = attend(*(part[:, :, :shift] for part in heads))
    return torch.cat([start, _in_groups([part[:, :, shift:] for part in heads], group, attend)], dim=2)


def _full_mask(mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """Return sdpa's mask of a module that does not train, although gradients are wanted."""
    if mask is None or mask.shape[2] == length:
        return mask
    return sdpa_mask(len(mask), length, length, attention_mask=mask[:, 0, 0], device=mask.device)
