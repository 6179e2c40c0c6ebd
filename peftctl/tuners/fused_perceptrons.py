"""What AdapterFusion computes at one place: attention over the changes of several finished adapters.

    a_i = U_i φ_i(D_i h + b_i1) + b_i2,   p = softmax_i(q · k_i),   q = Wq h + bq,   k_i = Wk a_i
    change(h) = Σ_i p_i Wv a_i

for every token h, (..., d), with p: (..., N) over N frozen adapters and without a division by √d. As Wv has no bias, it
is applied once, to Σ_i p_i a_i; and q · k_i is computed as (Wk^T q) · a_i, so that no N keys are kept. Keys have no
bias: q · bk is the same for all i, which softmax does not see, and a gradient of mere rounding would train it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from peftctl.tuners.perceptrons import Perceptron


class FrozenPerceptrons(nn.ModuleList):
    """Finished adapters: they stay as they are, also where peft marks an adapter's tensors as trainable."""


class FusedPerceptrons(nn.Module):
    """N frozen perceptrons and the attention over them; a kind of adapter module.

    Wq and Wk are normal with a deviation of 0.02, bq is 0; Wv is the identity but for 1e-6 beside its diagonal.

    Args:
        width: d.
        config: Of `bottleneck.py`; its options hold `bottlenecks` and `activations`, m and φ of each adapter.
    """

    def __init__(self, width: int, config: Any) -> None:
        super().__init__()
        kinds = zip(config.options["bottlenecks"], config.options["activations"], strict=True)
        self.adapters = FrozenPerceptrons(
            Perceptron(width, replace(config, bottleneck=m, activation=a)) for m, a in kinds
        )
        self.adapters.requires_grad_(False)
        self.query = nn.Parameter(torch.empty(width, width).normal_(std=0.02))
        self.query_bias = nn.Parameter(torch.zeros(width))
        self.key = nn.Parameter(torch.empty(width, width).normal_(std=0.02))
        self.value = nn.Parameter(torch.full((width, width), 1e-6).fill_diagonal_(1.0))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Return Σ_i p_i Wv a_i for h of shape (..., d), in the type of h."""
        changes = torch.stack([adapter(h) for adapter in self.adapters], -2)
        p = self.attention(h, changes)
        return functional.linear((p.unsqueeze(-2) @ changes).squeeze(-2), self.value.to(h.dtype))

    def attention(self, h: torch.Tensor, changes: torch.Tensor) -> torch.Tensor:
        """Return p, (..., N), in the type of h.

        Args:
            h: (..., d).
            changes: a_i, (..., N, d).
        """
        q = functional.linear(h, self.query.to(h.dtype), self.query_bias.to(h.dtype))
        scores = (changes @ (q @ self.key.to(h.dtype)).unsqueeze(-1)).squeeze(-1)
        return scores.softmax(-1, dtype=torch.promote_types(h.dtype, torch.float32)).to(h.dtype)


def identity_distance(model: nn.Module) -> torch.Tensor:
    """Return Σ |I - Wv|_F^2 over all places of a model."""
    distances = []
    for module in model.modules():
        if isinstance(module, FusedPerceptrons):
            identity = torch.eye(len(module.value), dtype=module.value.dtype, device=module.value.device)
            distances.append((module.value - identity).square().sum())
    return torch.stack(distances).sum()
