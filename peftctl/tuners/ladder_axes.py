"""What the axes of a block's weights count: which rows and columns of which tensors belong to one unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftctl.errors import UsageError
from peftctl.models.anatomy import fused_parts, places, sublayer_ends, widths
from peftctl.tuners.ladder_stack import Stack

_INNER = {"gate": "inner", "up": "inner"}
"""Parts of a fused projection whose units are those of the feed-forward part."""


@dataclass(frozen=True)
class Part:
    """Positions on an axis, (n,): unit u of a role stands at `places[u]`.

    Roles are `stream`; q, k, v and o (what the heads return); `inner` of the feed-forward part; `whole`, never cut.
    """

    role: str
    places: torch.Tensor


Axes = Mapping[str, Sequence[Sequence[Part]]]
"""Name of a parameter in its block -> for each of its axes the parts."""


class BlockAxes:
    """The axes of blocks of one kind.

    Args:
        model: The base, with or without side networks.
        stack: Of it.

    Raises:
        UsageError: Where the sublayers of the architecture end is not known.
    """

    def __init__(self, model: nn.Module, stack: Stack):
        block = stack.block_list(model)[0]
        found = ((name, module) for name, module in model.named_modules() if module is block)
        self.prefix = next(found)[0] + "."
        linear = [f"{self.prefix}{name}" for name, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D)]
        try:
            ends = sublayer_ends(model, linear)
        except UsageError as error:
            raise unknown(model.config) from error
        self.ends = {name.removeprefix(self.prefix) for names in ends.values() for name in names}
        self.attention = {p.name.removeprefix(self.prefix): p.attention for p in places(model, linear)}

    def of(self, block: nn.Module, config: Any) -> Axes:
        """Return the axes of a block of the base, or of one of the side.

        Args:
            block: The block.
            config: The configuration that it is made from.

        Raises:
            UsageError: An axis is not known.
        """
        found: dict[str, Sequence[Sequence[Part]]] = {}
        for name, module in block.named_modules():
            if name in self.attention:
                inputs, outputs = self._linear(name, module, config)
                flipped = isinstance(module, Conv1D)
                found[f"{name}.weight"] = (inputs, outputs) if flipped else (outputs, inputs)
                found[f"{name}.bias"] = (outputs,)
            else:
                for own, p in module.named_parameters(recurse=False):
                    found[f"{name}.{own}"] = (self._vector(name, p, config),)
        return found

    def _linear(self, name: str, module: nn.Module, config: Any) -> tuple[list[Part], list[Part]]:
        d_in, d_out = widths(module)
        attends = self.attention[name] is not None
        if name in self.ends:
            return [_part("o" if attends else "inner", range(d_in))], [_part("stream", range(d_out))]
        stream = [_part("stream", range(d_in))]
        if parts := fused_parts(config, name, d_out):
            return stream, [_part(_INNER.get(role, role), rows) for role, rows in parts.items()]
        role = name.rsplit(".", 1)[-1].lower().removeprefix("w")[:1] if attends else "inner"
        if role not in {"q", "k", "v", "inner"}:
            raise unknown(config)
        return stream, [_part(role, range(d_out))]

    def _vector(self, name: str, p: torch.Tensor, config: Any) -> list[Part]:
        inside = {f"{a.removeprefix(self.prefix)}." for a in self.attention.values() if a}
        if not any(name.startswith(attention) for attention in inside):
            return [_part("stream", range(len(p)))]
        # A norm of queries or keys: of each head alone, or of all at once.
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        role = name.rsplit(".", 1)[-1].lower()[:1]
        return [_part("whole" if len(p) == head else role, range(len(p)))]


def values_of(block: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters of a block by name, quantised ones as they are multiplied."""
    found = {name: p.detach() for name, p in block.named_parameters()}
    for name, module in block.named_modules():
        weight: Any = module.weight if isinstance(module, nn.Linear) else None
        if weight is not None and (kind := get_bnb_param_type(weight)):
            # peft's function for whole layers makes 8-bit ones on the CPU lose their scales.
            state = module.state if kind == "8bit" else None
            found[f"{name}.weight"] = dequantize_bnb_weight(weight, state=state).detach()
    return found


def unknown(config: Any) -> UsageError:
    """Return the error for an architecture whose blocks can't be cut."""
    return UsageError(
        f"method.init: which rows of the {config.model_type} architecture's weights belong together is not known here; "
        "take random"
    )


def _part(role: str, rows: Sequence[int]) -> Part:
    return Part(role, torch.tensor(rows, dtype=torch.long))
