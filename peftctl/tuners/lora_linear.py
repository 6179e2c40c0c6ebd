"""A LoRA layer for training that never copies its input to float32. Saved adapters are stock peft.

    y = W x + (s B) (A x),   A, B: float32 for the optimizer, cast to the dtype of x for the products

peft's own layer casts x to the type of A and keeps that float32 copy for the backward pass, once a target. Casting
A: (r, d_in) and B: (d_out, r) instead costs almost nothing. In eval mode the layer is peft's own.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch.nn import functional


class LoraLinear(lora.Linear):
    """peft's LoRA layer with a leaner training forward."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return W x + s B A dropout(x) for x of shape (..., d_in)."""
        if args or kwargs or not self._plain_training():
            return super().forward(x, *args, **kwargs)
        name = self.active_adapters[0]
        a: torch.Tensor = self.lora_A[name].weight  # type: ignore[assignment]
        b: torch.Tensor = self.lora_B[name].weight  # type: ignore[assignment]
        low = functional.linear(self.lora_dropout[name](x), a.to(x.dtype))
        return self.base_layer(x) + functional.linear(low, (b * self.scaling[name]).to(x.dtype))

    def _plain_training(self) -> bool:
        one_plain_adapter = len(self.active_adapters) == 1 and not self.lora_variant
        return self.training and one_plain_adapter and not (self.disable_adapters or self.merged)
