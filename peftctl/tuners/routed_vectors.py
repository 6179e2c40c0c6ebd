"""Mixtures of (IA)^3 vectors as a tuner of peft, for MoV.

    z <- z * (1 + Σ_e p_e (l_e - 1)),   l_e: (d,), p = softmax(R z), R: (E, d), z: (..., d)

which is z * Σ_e p_e l_e, as the p_e sum to 1; written like this, vectors that are all 1 leave z as it is to the last
bit, also where p is rounded to bfloat16. z is the output of a layer, or the input of one that ends a feed-forward part.
The tensors are float32 for the optimizer and are cast to the type of z.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from peft import PeftConfig
from torch import nn

from peftctl.tuners.routing import Init, RoutedLayer, RoutedModel, Routing, draw, route, widths

TYPE = "PEFTCTL_ROUTED_VECTORS"
"""What adapter_config.json calls this tuner."""


@dataclass
class RoutedVectorsConfig(PeftConfig):
    """Settings that are saved with the adapter.

    Args:
        experts: E.
        init: How R starts; vectors start at 1.
        feedforward: Full names of the layers whose input is scaled; of the others it is the output.
        target_modules: All layers with vectors, as in every tuner of peft.
        exclude_modules: Exceptions from it.
        modules_to_save: Modules that train whole beside the vectors.
    """

    experts: int = 10
    init: Init = "normal"
    feedforward: list[str] = field(default_factory=list)
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TYPE


class VectorExperts(nn.Module):
    """E vectors and their router."""

    def __init__(self, width: int, config: RoutedVectorsConfig):
        super().__init__()
        self.router = nn.Parameter(torch.empty(config.experts, width))
        draw(self.router.data, config.init)
        self.vectors = nn.Parameter(torch.ones(config.experts, width))

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, Routing]:
        """Return z of shape (..., d) with every token scaled, in its type, and how tokens chose."""
        routing = route(z, self.router)
        change = routing.gates.to(z.dtype) @ (self.vectors - 1).to(z.dtype)
        return z * (1 + change), routing


class RoutedVectorsLayer(RoutedLayer):
    """A linear layer whose output or input is scaled."""

    adapter_layer_names = ("routed_scale_experts",)

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.scales_input = False

    def update_layer(self, adapter_name: str, config: RoutedVectorsConfig, name: str) -> None:
        """Add an adapter in its initial state to the layer of this name."""
        self.scales_input = name in config.feedforward
        d_in, d_out = widths(self.get_base_layer())
        self.add(adapter_name, VectorExperts(d_in if self.scales_input else d_out, config), config.inference_mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return W (z) + b, or the scaled W x + b, for x of shape (..., d_in)."""
        return self.base_layer(self._scaled(x)) if self.scales_input else self._scaled(self.base_layer(x))

    def _scaled(self, z: torch.Tensor) -> torch.Tensor:
        for experts in self.active():
            z, routing = experts(z)
            self.told(routing)
        return z

    def __repr__(self) -> str:
        return "routed_scale." + super().__repr__()


class RoutedVectorsModel(RoutedModel):
    """Puts a `RoutedVectorsLayer` around every target."""

    prefix = "routed_scale_"
    tuner_layer_cls = RoutedVectorsLayer
