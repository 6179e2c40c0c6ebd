"""A Kronecker product beside whole feed-forward blocks, as a tuner of peft; the product is never built.

    y = FFN(x) + s (A kron B) x [+ l x],   A: (a1, a2), B: (b1, b2), a1 b1 = a2 b2 = d, l: a trained number

x: (..., d) is what the block's first linear layer reads. The sum is made where its last linear layer returns, which is
the block's output but for dropout behind it. A and l are 0 at first, B is drawn Kaiming-uniform. The tensors are
float32 for the optimizer and are cast to the type of x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional

from peftctl.tuners._layer_tuner import LayerTuner

TYPE = "PEFTCTL_KRON_BLOCK"
"""What adapter_config.json calls this tuner."""


@dataclass
class KronBlockConfig(PeftConfig):
    """Settings that are saved with the adapter.

    Args:
        shape_a: (a1, a2).
        shape_b: (b1, b2).
        scale: s.
        residual: Whether l x is added.
        entries: Name of a block's last linear layer -> name of its first one.
        target_modules: The last linear layers of the blocks, as in every tuner of peft.
        exclude_modules: Exceptions from it.
        modules_to_save: Modules that train whole beside the adapters.
    """

    shape_a: list[int] = field(default_factory=list)
    shape_b: list[int] = field(default_factory=list)
    scale: float = 1.0
    residual: bool = False
    entries: dict[str, str] = field(default_factory=dict)
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TYPE


class KronBlockLayer(nn.Module, BaseTunerLayer):
    """The last linear layer of a feed-forward block, with what stands beside the block."""

    adapter_layer_names = ("kron_block_a", "kron_block_b", "kron_block_l")

    def __init__(self, base_layer: nn.Module, entry: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.kron_block_a = nn.ParameterDict()
        self.kron_block_b = nn.ParameterDict()
        self.kron_block_l = nn.ParameterDict()
        self.scales: dict[str, float] = {}
        self.read: torch.Tensor | None = None
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        entry.register_forward_pre_hook(self._keep)

    def _keep(self, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Keep x from the block's first layer to its last; where activations are recomputed both run again."""
        self.read = args[0]

    def update_layer(self, adapter_name: str, config: KronBlockConfig) -> None:
        """Add an adapter in its initial state."""
        b = torch.empty(*config.shape_b)
        nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        self.kron_block_a[adapter_name] = nn.Parameter(torch.zeros(*config.shape_a))
        self.kron_block_b[adapter_name] = nn.Parameter(b)
        if config.residual:
            self.kron_block_l[adapter_name] = nn.Parameter(torch.zeros(1))
        self.scales[adapter_name] = config.scale
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def change(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """Return s (A kron B) x, and l x where there is an l, for x of shape (..., d), in the type of x."""
        a, b = self.kron_block_a[adapter_name] * self.scales[adapter_name], self.kron_block_b[adapter_name]
        a, b = a.to(x.dtype), b.to(x.dtype)
        rows = x.unflatten(-1, (a.shape[1], b.shape[1]))
        result = functional.linear(functional.linear(rows, b).mT, a).mT.flatten(-2)
        if adapter_name in self.kron_block_l:
            result = result + self.kron_block_l[adapter_name].to(x.dtype) * x
        return result

    def forward(self, h: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return W h + b + the change of what the block has read, for h of shape (..., d_ff)."""
        result: torch.Tensor = self.base_layer(h, *args, **kwargs)
        x, self.read = self.read, None
        if self.disable_adapters:
            return result
        assert x is not None  # the block's first layer has run
        for name in self.active_adapters:
            if name in self.kron_block_a:
                result = result + self.change(name, x)
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: the block between input and output is not linear.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("no weight of a feed-forward block can take up what stands beside the whole block")

    def __repr__(self) -> str:
        return "kron_block." + super().__repr__()


class KronBlockModel(LayerTuner):
    """Puts a `KronBlockLayer` around the last linear layer of every chosen block."""

    prefix = "kron_block_"
    tuner_layer_cls = KronBlockLayer

    def around(self, target: nn.Module, config: Any, key: str) -> Any:
        """Return the layer around the last linear layer of a block, which reads what goes into the block's first."""
        return KronBlockLayer(target, self.model.get_submodule(config.entries[key]))
