"""Bottleneck adapters as a tuner of peft: a small perceptron with a skip connection behind a layer.

    A(h) = h + U φ(D h + b1) + b2,   D: (m, d), U: (d, m), h: (..., d) what the layer returned

D is drawn from a normal distribution cut off at two deviations, U and the biases are 0, so A starts as the identity.
The tensors are float32 for the optimizer and are cast to the type of h: h itself is never copied to float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from peftctl.tuners._layer_tuner import LayerTuner

TYPE = "PEFTCTL_BOTTLENECK"
"""What adapter_config.json calls this tuner."""


@dataclass
class BottleneckConfig(PeftConfig):
    """Settings that are saved with the adapter.

    Args:
        bottleneck: m.
        activation: φ, by its name in transformers.
        init_std: Standard deviation of D before it is cut off.
        target_modules: Linear layers that an adapter follows, as in every tuner of peft.
        exclude_modules: Exceptions from it.
        modules_to_save: Modules that train whole beside the adapters.
    """

    bottleneck: int = 64
    activation: str = "gelu"
    init_std: float = 1e-3
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TYPE


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A linear layer of d outputs with an adapter behind it."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.activations: dict[str, nn.Module] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter in its initial state."""
        width = _width(self.get_base_layer())
        down, up = nn.Linear(width, config.bottleneck), nn.Linear(config.bottleneck, width)
        nn.init.trunc_normal_(down.weight, std=config.init_std, a=-2 * config.init_std, b=2 * config.init_std)
        for zero in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zero)
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        self.activations[adapter_name] = ACT2FN[config.activation]
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def change(self, adapter_name: str, h: torch.Tensor) -> torch.Tensor:
        """Return U φ(D h + b1) + b2 for h of shape (..., d), in the type of h."""
        down: Any = self.bottleneck_down[adapter_name]
        up: Any = self.bottleneck_up[adapter_name]
        low = functional.linear(h, down.weight.to(h.dtype), down.bias.to(h.dtype))
        return functional.linear(self.activations[adapter_name](low), up.weight.to(h.dtype), up.bias.to(h.dtype))

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return A(W x + b) for x of shape (..., d_in), one active adapter after the other."""
        h = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return h
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                h = h + self.change(name, h)
        return h

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: there is no matrix that computes the same.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("a bottleneck adapter is not linear: no weight of the base can take it up")

    def __repr__(self) -> str:
        return "bottleneck." + super().__repr__()


class BottleneckModel(LayerTuner):
    """Puts a `BottleneckLayer` around every target."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer


def _width(layer: nn.Module) -> int:
    """Return d, the outputs of a linear layer, also of a quantised one."""
    width = layer.nf if isinstance(layer, Conv1D) else layer.out_features
    assert isinstance(width, int)
    return width
