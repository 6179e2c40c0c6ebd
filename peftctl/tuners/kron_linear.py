"""Kronecker-product layers for training that never build the product. Saved adapters are stock peft (LoKr).

    (A kron B) x = vec(A X B^T),   A: (a1, a2), B: (b1, b2), X: (a2, b2) with x as its rows one after the other

peft's own layers build A kron B: (a1 b1, a2 b2) in every forward pass and keep it, and a float32 copy of x, for the
backward pass. In eval mode the layers are peft's own, so an adapter answers alike when plain peft has read it back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lokr import layer as lokr
from torch import nn
from torch.nn import functional


def lean_training(model: nn.Module) -> None:
    """Let the LoKr layers of a peft model train without building the product, in place."""
    for _, layer in layers(model):
        # peft makes its layers by their base's type and can't be told of another kind; ours has the same tensors.
        layer.__class__ = KronLinear


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers with their names in the model."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, lokr.Linear))


class KronLinear(lokr.Linear):
    """peft's LoKr layer over a Linear, of full factors, with a leaner training forward."""

    def _get_delta_activations(  # type: ignore[override]  # peft's own classes disagree on the name of `input`
        self, adapter_name: str, input: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Return s (A kron B) x for x of shape (..., d_in)."""
        if not self.training:
            return super()._get_delta_activations(adapter_name, input, *args, **kwargs)
        a, b = self.lokr_w1[adapter_name] * self.scaling[adapter_name], self.lokr_w2[adapter_name]
        a, b = a.to(input.dtype), b.to(input.dtype)
        rows = input.unflatten(-1, (a.shape[1], b.shape[1]))
        return functional.linear(functional.linear(rows, b).mT, a).mT.flatten(-2)
