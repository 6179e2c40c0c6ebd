"""Mixtures of LoRA experts as a tuner of peft, for MoLoRA, MoLA and LoRAMoE.

    y = W x + (alpha / r) Σ_e g_e B_e A_e x,   A_e: (r, d_in), B_e: (d_out, r), g: (..., E) the gates of `routing.py`

All A_e are one product, the gates scale its E pieces of r, and all B_e are one product over E r, which adds the experts
up: no tensor of (..., E, d_out) is made. B_e starts at 0, so the layer starts as the base exactly. The tensors are
float32 for the optimizer and are cast to the type of x for the products.

A dense mixture keeps all A_e in one tensor, and all B_e in one. Top-k keeps a pair for each expert: what no token
chose can then stand still, whatever the optimizer does with the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from peft import PeftConfig
from torch import nn
from torch.nn import functional

from peftctl.tuners.routing import Init, RoutedLayer, RoutedModel, Routing, draw, route, widths

TYPE = "PEFTCTL_ROUTED_LORA"
"""What adapter_config.json calls this tuner."""


@dataclass
class RoutedLoraConfig(PeftConfig):
    """Settings that are saved with the adapter.

    Args:
        experts: E of every layer that `experts_of` does not name.
        experts_of: Full name of a layer -> its E.
        r: Rank of an expert.
        alpha: The sum of the experts is multiplied by alpha / r.
        dropout: On what the experts read, not the router, in training only.
        k: How many experts a token has; None for all.
        renormalise: Whether the gates of top-k sum to 1.
        init: How A and R start.
        target_modules: Linear layers that have experts, as in every tuner of peft.
        exclude_modules: Exceptions from it.
        modules_to_save: Modules that train whole beside the experts.
    """

    experts: int = 8
    experts_of: dict[str, int] = field(default_factory=dict)
    r: int = 4
    alpha: float = 16
    dropout: float = 0.0
    k: int | None = None
    renormalise: bool = False
    init: Init = "kaiming"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TYPE


class LoraExperts(nn.Module):
    """E pairs of factors and their router.

    The factors lie in this very module, not in lists below it: engines that divide weights gather what a module itself
    has when it is called.
    """

    def __init__(self, d_in: int, d_out: int, experts: int, config: RoutedLoraConfig):
        super().__init__()
        self.config = config
        self.pieces = experts if config.k is not None else 1
        self.router = nn.Parameter(torch.empty(experts, d_in))
        draw(self.router.data, config.init)
        rows = experts * config.r // self.pieces
        for i in range(self.pieces):
            self.register_parameter(f"A_{i}", nn.Parameter(torch.empty(rows, d_in)))
            self.register_parameter(f"B_{i}", nn.Parameter(torch.zeros(d_out, rows)))
            draw(self.get_parameter(f"A_{i}").data, config.init)

    def pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Return (A, B), (rows, d_in) and (d_out, rows): of every expert for top-k, else one pair over all of them."""
        return [(self.get_parameter(f"A_{i}"), self.get_parameter(f"B_{i}")) for i in range(self.pieces)]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Routing]:
        """Return the update of the layer's output, (..., d_out), in the type of x, and how tokens chose."""
        downs, ups = zip(*self.pairs(), strict=True)
        routing = route(x, self.router, self.config.k, self.config.renormalise)
        gates = (routing.gates * (self.config.alpha / self.config.r)).to(x.dtype)
        wide = functional.dropout(x, self.config.dropout, self.training)
        low = functional.linear(wide, _joined(downs, 0).to(x.dtype))
        weighed = low.unflatten(-1, (-1, self.config.r)) * gates[..., None]
        return functional.linear(weighed.flatten(-2), _joined(ups, 1).to(x.dtype)), routing


class RoutedLoraLayer(RoutedLayer):
    """A linear layer with LoRA experts beside it."""

    adapter_layer_names = ("routed_lora_experts",)

    def update_layer(self, adapter_name: str, config: RoutedLoraConfig, name: str) -> None:
        """Add an adapter in its initial state to the layer of this name."""
        d_in, d_out = widths(self.get_base_layer())
        made = LoraExperts(d_in, d_out, config.experts_of.get(name, config.experts), config)
        self.add(adapter_name, made, config.inference_mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return W x + b plus the updates of the active adapters, for x of shape (..., d_in)."""
        result: torch.Tensor = self.base_layer(x)
        for experts in self.active():
            update, routing = experts(x)
            result = result + update
            self.told(routing)
        return result

    def __repr__(self) -> str:
        return "routed_lora." + super().__repr__()


class RoutedLoraModel(RoutedModel):
    """Puts a `RoutedLoraLayer` around every target."""

    prefix = "routed_lora_"
    tuner_layer_cls = RoutedLoraLayer


def _joined(pieces: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim)
