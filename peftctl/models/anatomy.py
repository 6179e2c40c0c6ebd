"""Where the parts of a transformer are, found by structure rather than by architecture names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from peftctl.errors import UsageError


def block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of the transformer blocks of a decoder-only or encoder-only model.

    Raises:
        UsageError: No list of modules is as long as `config.num_hidden_layers`, or several are (encoder-decoders).
    """
    depth = model.config.num_hidden_layers  # type: ignore[union-attr]
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    outer = [(n, m) for n, m in lists if not any(n.startswith(other + ".") for other, _ in lists)]
    if len(outer) != 1:
        found = ", ".join(name for name, _ in outer) or "none"
        raise UsageError(
            f"the {model.config.model_type} architecture is not supported here: "  # type: ignore[union-attr]
            f"expected one list of {depth} blocks, found {found}"
        )
    return outer[0]  # type: ignore[return-value]


def linear_parts(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Sort linear layers by the part of their block that they belong to.

    A block is an element of an outermost list of modules that holds attention somewhere. A layer belongs to attention
    where a module above it, or its own name, says so; the other layers of the block are its feed-forward part.

    Args:
        model: Any transformer: decoder-only, encoder-only or encoder-decoder.
        names: Of its linear layers.

    Returns:
        `attention` and `mlp`: the names of each, in the given order. Routers of experts belong to neither.
    """
    parts: dict[str, dict[str, list[str]]] = {}
    for place in places(model, names):
        of_list = parts.setdefault(place.home, {"attention": [], "mlp": []})
        of_list["attention" if place.attention is not None else "mlp"].append(place.name)
    blocks = [found for found in parts.values() if found["attention"]]
    return {part: [name for found in blocks for name in found[part]] for part in ("attention", "mlp")}


def sublayer_ends(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Find the linear layers whose output goes back to the residual stream, one in every sublayer.

    It is the last one that the sublayer creates among those that return states of the model's width. A block has one
    feed-forward sublayer, and one sublayer for each module of attention: a decoder with cross-attention has two.

    Args:
        model: Any transformer.
        names: Of its linear layers, in the model's order.

    Returns:
        `attention` and `mlp`: the names of each, in the given order.

    Raises:
        UsageError: A sublayer has none, as where experts share it, or a block has no feed-forward sublayer.
    """
    names = list(names)
    width = model.config.get_text_config().hidden_size  # type: ignore[union-attr,operator]
    found = list(places(model, names))
    homes = {place.home for place in found if place.attention is not None}
    ends: dict[tuple[str, str | None], str | None] = {}
    for place in found:
        if place.home in homes:
            fits = widths(model.get_submodule(place.name))[1] == width
            ends[place.block, place.attention] = place.name if fits else ends.get((place.block, place.attention))
    blocks = {block: {attention is None for other, attention in ends if other == block} for block, _ in ends}
    plain = all(kinds == {True, False} and not _has_experts(model.get_submodule(b)) for b, kinds in blocks.items())
    if not ends or not plain or None in ends.values():
        known = sorted({name.rsplit(".", 1)[-1] for name in names})
        raise UsageError(
            f"where the sublayers of the {model.config.model_type} architecture end is not known here; "  # type: ignore[union-attr]
            f"give method.target_modules: the layer that each of them ends with, among {', '.join(known)}"
        )
    chosen = {name: "mlp" if attention is None else "attention" for (_, attention), name in ends.items()}
    return {part: [name for name in names if chosen.get(name) == part] for part in ("attention", "mlp")}


def key_value_layers(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Find the linear layers that make keys and values, two in every module of attention.

    Args:
        model: Any transformer.
        names: Of its linear layers, in the model's order.

    Returns:
        Their names, in the given order.

    Raises:
        UsageError: A module of attention has none of its own, as where they are fused with the queries.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for place in places(model, names):
        if place.attention is not None:
            role = _KEY_VALUE.fullmatch(place.name.rsplit(".", 1)[-1].lower())
            found.setdefault((place.block, place.attention), []).extend([place.name] if role else [])
    if not found or any(len(pair) != 2 for pair in found.values()):
        raise UsageError(
            f"the {model.config.model_type} architecture has no linear layers of their own for keys and values; "  # type: ignore[union-attr]
            "take another method, or method.name: peft with type: IA3 and its target_modules"
        )
    return [name for pair in found.values() for name in pair]


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return the LayerNorms and RMSNorms that have parameters, by name: every architecture calls its class a norm."""
    named = model.named_modules()
    return {name: m for name, m in named if "norm" in type(m).__name__.lower() and list(m.parameters(recurse=False))}


def fused_parts(config: Any, name: str, rows: int) -> dict[str, list[int]] | None:
    """Return which output rows of a fused projection are which part, or None where nothing is known of it.

    Args:
        config: The model's.
        name: Of the module.
        rows: d_out.

    Returns:
        Part (q, k, v, or gate, up) -> its rows, ascending; together they are all rows.
    """
    layout = _FUSED.get((config.model_type, name.rsplit(".", 1)[-1]))
    if layout is None or "crossattention" in name:  # there GPT-2's c_attn makes k and v of another sequence
        return None
    groups, sizes = layout(config, rows)
    stride, first = sum(sizes.values()), 0
    found = {}
    for part, size in sizes.items():
        found[part] = [group * stride + first + i for group in range(groups) for i in range(size)]
        first += size
    return found


@dataclass(frozen=True)
class Place:
    """Where a linear layer is: the list of blocks, the block, and the module of attention around it, if any."""

    name: str
    home: str
    block: str
    attention: str | None


def places(model: nn.Module, names: Iterable[str]) -> Iterator[Place]:
    """Yield where linear layers are, without those outside of blocks and those that choose experts."""
    modules = dict(model.named_modules())
    lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    for name in names:
        home = next((home for home in outermost if name.startswith(home + ".")), None)
        if home is None or name.rsplit(".", 1)[-1] in _ROUTERS:
            continue
        number, *below = name[len(home) + 1 :].split(".")
        block = f"{home}.{number}"
        above = [".".join([block, *below[:depth]]) for depth in range(1, len(below))]
        marked = [n for n in above if _is_attention(n.rsplit(".", 1)[-1]) or _is_attention(type(modules[n]).__name__)]
        parent = name.rpartition(".")[0]
        attention = marked[0] if marked else parent if _is_attention(below[-1]) else None
        yield Place(name, home, block, attention)


def _has_experts(block: nn.Module) -> bool:
    """Tell whether experts share a sublayer: none of their linear layers returns its output."""
    return any("expert" in name for name, _ in block.named_modules()) or any(p.dim() > 2 for p in block.parameters())


def widths(layer: nn.Module) -> tuple[int, int]:
    """Return (d_in, d_out) of a linear layer, also of a quantised one."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf  # type: ignore[return-value]
    return layer.in_features, layer.out_features  # type: ignore[return-value]


_KEY_VALUE = re.compile(r"w?(k|v|key|value)(_?(proj|lin|linear|layer))?")
"""Last names of linear layers that make keys or values; a fused one is called after all that it makes."""

_ROUTERS = ("gate", "router", "shared_expert_gate")
"""Last names of linear layers that choose experts; Llama's gate_proj is another thing."""


def _is_attention(name: str) -> bool:
    return "attention" in name.lower() or "attn" in name.lower()


_Layout = tuple[int, dict[str, int]]
"""How many equal groups the output rows fall into, and the rows of each part in a group, in their order."""


def _blocks_of_parts(config: Any, rows: int, key_value_heads: int | None = None) -> _Layout:
    """All of q, then all of k, then all of v."""
    heads = config.num_attention_heads
    shared = key_value_heads or heads
    head = rows // (heads + 2 * shared)
    return 1, {"q": heads * head, "k": shared * head, "v": shared * head}


def _per_head(config: Any, rows: int) -> _Layout:
    """Head after head, each with its q, k and v."""
    heads = config.num_attention_heads
    return heads, dict.fromkeys("qkv", rows // heads // 3)


def _gate_up(config: Any, rows: int) -> _Layout:
    return 1, {"gate": rows // 2, "up": rows // 2}


def _phi3(config: Any, rows: int) -> _Layout:
    return _blocks_of_parts(config, rows, config.num_key_value_heads)


def _falcon(config: Any, rows: int) -> _Layout:
    if config.new_decoder_architecture:  # a group: the q heads that share a k and a v head, then those two
        groups, heads = config.num_kv_heads, config.num_attention_heads
        head = rows // (heads + 2 * groups)
        return groups, {"q": heads // groups * head, "k": head, "v": head}
    return _blocks_of_parts(config, rows, 1) if config.multi_query else _per_head(config, rows)


def _gpt_bigcode(config: Any, rows: int) -> _Layout:
    return _blocks_of_parts(config, rows, 1) if config.multi_query else _per_head(config, rows)


def _chatglm(config: Any, rows: int) -> _Layout:
    if config.multi_query_attention:
        return _blocks_of_parts(config, rows, config.multi_query_group_num)
    return _per_head(config, rows)


_FUSED: dict[tuple[str, str], Callable[[Any, int], _Layout]] = {
    ("gpt2", "c_attn"): _blocks_of_parts,
    ("gpt_bigcode", "c_attn"): _gpt_bigcode,
    ("gpt_neox", "query_key_value"): _per_head,
    ("bloom", "query_key_value"): _per_head,
    ("falcon", "query_key_value"): _falcon,
    ("chatglm", "query_key_value"): _chatglm,
    ("mpt", "Wqkv"): _blocks_of_parts,
    ("phi3", "qkv_proj"): _phi3,
    ("phi3", "gate_up_proj"): _gate_up,
    ("glm", "gate_up_proj"): _gate_up,
    ("glm4", "gate_up_proj"): _gate_up,
}
"""(architecture, last name of the module) -> how its output is cut, read in the architecture's forward pass."""
