"""Bottleneck adapters of which those in the lowest blocks rest, in training other ones at every step.

How many blocks have none is a number that the forward reads: which tensors train never changes. Where an adapter
rests nothing is computed, so that the states below the lowest one that works are the base's, bit for bit, and need no
gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from peftctl.tuners.bottleneck import AroundLayer, BottleneckConfig, BottleneckLayer, BottleneckModel

TYPE = "PEFTCTL_ADAPTER_DROP"
"""What adapter_config.json calls this tuner."""


@dataclass
class AdapterDropConfig(BottleneckConfig):
    """Settings that are saved with the adapter.

    Args:
        depths: Target -> how many blocks are run before its own.
        drop: n: outside of training the adapters of the n lowest blocks rest.
    """

    depths: dict[str, int] = field(default_factory=dict)
    drop: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TYPE


class RestingLayer(BottleneckLayer):
    """A layer whose adapters rest where the model drops those of its block."""

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.training = base_layer.training  # a new module would train in a model that does not
        self.depths: dict[str, int] = {}
        self.drops: dict[str, int] = {}
        self.training_drop = 0

    def update_layer(self, adapter_name: str, config: AdapterDropConfig, depth: int) -> None:  # type: ignore[override]
        """Add an adapter in its initial state."""
        self.depths[adapter_name] = depth
        self.drops[adapter_name] = config.drop
        super().update_layer(adapter_name, config)

    def running(self) -> list[str]:
        """Return the active adapters that do not rest."""
        return [name for name in super().running() if self.depths[name] >= self._drop(name)]

    def _drop(self, name: str) -> int:
        return self.training_drop if self.training else self.drops[name]


class RestingAroundLayer(RestingLayer, AroundLayer):
    """The same around a block, or the LayerNorm that ends one."""


class AdapterDropModel(BottleneckModel):
    """Puts a `RestingLayer` around every target."""

    tuner_layer_cls = RestingLayer
    placements = {"behind": RestingLayer, "around": RestingAroundLayer}  # noqa: RUF012

    def settings(self, config: Any, key: str) -> Sequence[Any]:
        """Return the configuration and the depth of a target."""
        return config, config.depths[key]


def drop_in_training(model: nn.Module, blocks: int) -> None:
    """Let the adapters of this many lowest blocks rest while the model trains."""
    for module in model.modules():
        if isinstance(module, RestingLayer):
            module.training_drop = blocks
