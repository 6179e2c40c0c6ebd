"""Bottleneck adapters whose matrices are sums of Kronecker products, with one factor for the whole model: Compacter.

    change(h) = P_up φ(P_down h),   P x = W^T x + b,   W = Σ_{i=1..n} A_i ⊗ (s_i t_i)

between widths k and l, with W: (k, l), A: (n, n, n), the same tensor in every P of the model, s: (n, k/n, r),
t: (n, r, l/n), b: (l,). W is built in every forward pass in the type of its factors and rounded once to that of h: it
has k l entries whatever the batch, where the factored product would keep 2 n^2 r for every token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from peftctl.tuners.bottleneck import BottleneckConfig, BottleneckLayer, BottleneckModel
from peftctl.tuners.fastfood import Shared

TYPE = "PEFTCTL_HYPERCOMPLEX"
"""What adapter_config.json calls this tuner."""


@dataclass
class HypercomplexConfig(BottleneckConfig):
    """Settings that are saved with the adapter, beside those of a plain bottleneck adapter behind linear layers.

    Args:
        n: Terms of the sum, and the side of A_i; divides d and m.
        rank: r.
        init_std: Standard deviation of A at first.
    """

    n: int = 4
    rank: int = 1
    init_std: float = 1e-4  # type: ignore[assignment]  # there, None is a start of another kind

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TYPE


class Hypercomplex(nn.Module):
    """One P, without its A: s and t are Glorot-uniform with a gain of √2, b is 0.

    Args:
        k: Width of what it reads.
        m: Width of what it returns, l above.
        n: Terms of the sum.
        rank: r.
    """

    def __init__(self, k: int, m: int, n: int, rank: int) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.empty(n, k // n, rank))
        self.t = nn.Parameter(torch.empty(n, rank, m // n))
        self.bias = nn.Parameter(torch.zeros(m))
        for i in range(n):
            for factor in (self.s[i], self.t[i]):
                nn.init.xavier_uniform_(factor, gain=math.sqrt(2))

    def forward(self, x: torch.Tensor, rule: torch.Tensor) -> torch.Tensor:
        """Return W^T x + b in the type of x.

        Args:
            x: (..., k).
            rule: A, (n, n, n).
        """
        return functional.linear(x, self.weight(rule).T.to(x.dtype), self.bias.to(x.dtype))

    def weight(self, rule: torch.Tensor) -> torch.Tensor:
        """Return W, (k, l)."""
        # (a, b), i times i, (p, q), laid out as row a k/n + p and column b l/n + q
        blocks = torch.tensordot(rule, self.s @ self.t, dims=([0], [0]))
        return blocks.transpose(1, 2).flatten(2).flatten(0, 1)


class HypercomplexPerceptron(nn.Module):
    """P_up φ P_down.

    Args:
        width: d.
        config: m, n, r and φ.
        rules: A of all adapters.
        name: Which of them is this one's.
    """

    def __init__(self, width: int, config: HypercomplexConfig, rules: Shared, name: str) -> None:
        super().__init__()
        self.down = Hypercomplex(width, config.bottleneck, config.n, config.rank)
        self.up = Hypercomplex(config.bottleneck, width, config.n, config.rank)
        self.activation = ACT2FN[config.activation]
        self._shared = (rules, name)  # in a tuple, which keeps A from being this module's own

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Return P_up φ(P_down h) for h of shape (..., d), in the type of h."""
        rules, name = self._shared
        rule = rules(name)
        result: torch.Tensor = self.up(self.activation(self.down(h, rule)), rule)
        return result


class HypercomplexLayer(BottleneckLayer):
    """A linear layer with an adapter behind it.

    Args:
        base_layer: The layer.
        rules: A of all adapters, which belong to the tuner: every layer has the same.
    """

    adapter_layer_names = ("bottleneck_adapter", "bottleneck_rule")

    def __init__(self, base_layer: nn.Module, rules: Shared):
        super().__init__(base_layer)
        self._shared = (rules,)  # in a tuple, as above

    @property
    def bottleneck_rule(self) -> Shared:
        """Adapter -> A, (n, n, n)."""
        return self._shared[0]

    def update_layer(self, adapter_name: str, config: Any) -> None:
        """Add an adapter in its initial state: in float32, unlike peft, which would round A to the base's type."""
        base: Any = self.get_base_layer()
        width = base.nf if isinstance(base, Conv1D) else base.out_features
        adapter = HypercomplexPerceptron(width, config, self.bottleneck_rule, adapter_name)
        self.bottleneck_adapter[adapter_name] = adapter.to(base.weight.device)
        self.scalings[adapter_name] = config.scaling
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)


class HypercomplexModel(BottleneckModel):
    """Puts a `HypercomplexLayer` around every target, and owns A."""

    tuner_layer_cls = HypercomplexLayer
    uses_shared_state = True

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Draw A of an adapter, and make the layers that read it."""
        if "bottleneck_rule" not in self._modules:
            self.bottleneck_rule = Shared()
        config: Any = self.peft_config[adapter_name]
        rule = torch.empty(config.n, config.n, config.n, device=next(model.parameters()).device)
        self.bottleneck_rule[adapter_name] = nn.Parameter(nn.init.normal_(rule, std=config.init_std))
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def around(self, target: nn.Module, config: Any, key: str) -> Any:
        """Return the layer around a target, without an adapter."""
        return HypercomplexLayer(target, self.bottleneck_rule)
