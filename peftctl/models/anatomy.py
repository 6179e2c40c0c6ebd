"""Where the parts of a transformer are, found by structure rather than by architecture names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

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
    modules = dict(model.named_modules())
    lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    parts: dict[str, dict[str, list[str]]] = {name: {"attention": [], "mlp": []} for name in outermost}
    for name in names:
        home = next((home for home in outermost if name.startswith(home + ".")), None)
        if home is None or name.rsplit(".", 1)[-1] in _ROUTERS:
            continue
        below = name[len(home) + 1 :].split(".")[1:]  # the first is the block's number
        prefix = name[: len(name) - len(".".join(below))]
        above = (modules[prefix + ".".join(below[:depth])] for depth in range(1, len(below)))
        marked = any(_is_attention(part) for part in below) or any(_is_attention(type(m).__name__) for m in above)
        parts[home]["attention" if marked else "mlp"].append(name)
    blocks = [found for found in parts.values() if found["attention"]]
    return {part: [name for found in blocks for name in found[part]] for part in ("attention", "mlp")}


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
