"""DoRA layers for training that keep no float32 copy of their input. Saved adapters are stock peft.

    y = W x + b + (c - 1) * (W x) + (c s B) (A x),   c = m / |V|,   V = W + s B A,   m, |V|: (d_out,)

|V|, the norm of every row, is a constant in the backward pass. c scales the rows of B, which are few, and what W x
already is, so that of all activations only W x: (batch, seq, d_out) is kept for m. c - 1 is 0 at first, exactly, and
keeps its precision in half types, where c itself would be rounded to 1. Unlike peft, dropout reaches A only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from torch.nn import functional

from peftctl.tuners.lora_linear import LeanTraining, training_layers


class DoraTraining(LeanTraining):
    """The training forward, for any of peft's LoRA layers over a matrix."""

    def _lean(self: Any, x: torch.Tensor) -> torch.Tensor:
        name = self.active_adapters[0]
        a: torch.Tensor = self.lora_A[name].weight
        b: torch.Tensor = self.lora_B[name].weight
        c = self.lora_magnitude_vector[name].weight / row_norms(self)
        result = self.base_layer(x)
        product = result if self.base_layer.bias is None else result - self.base_layer.bias
        low = functional.linear(self.lora_dropout[name](x), a.to(x.dtype))
        update = functional.linear(low, (c[:, None] * b * self.scaling[name]).to(x.dtype))
        return result + (c - 1).to(x.dtype) * product + update

    def one_operation(self: Any, dtype: torch.dtype) -> bool:
        """Never: W x is needed alone."""
        return False

    def _plain(self: Any) -> bool:
        return len(self.active_adapters) == 1 and not (self.disable_adapters or self.merged)


def dora_layers(model: nn.Module) -> dict[type[nn.Module], type[nn.Module]]:
    """Return base layer -> DoRA layer for `LoraConfig._register_custom_module`; the first that fits is taken."""
    return {
        base: type(layer.__name__.replace("Lora", "Dora"), (DoraTraining, layer), {})
        for base, layer in training_layers(model).items()
    }


def adapted(model: nn.Module) -> Iterator[Any]:
    """Yield the DoRA layers of a model."""
    return (module for module in model.modules() if isinstance(module, DoraTraining))


def set_magnitudes(layer: Any) -> None:
    """Let m be |V| of a layer whose adapter is new, in place: peft has rounded it to the type of the base."""
    layer.lora_magnitude_vector["default"].weight.data.copy_(row_norms(layer))


@torch.no_grad()
def row_norms(layer: Any) -> torch.Tensor:
    """Return the norms of the rows of V: (d_out,), in the type of A and B."""
    name = layer.active_adapters[0]
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    w = dequantize_module_weight(layer.get_base_layer()).to(a.dtype)
    update = layer.scaling[name] * (b @ a)
    return torch.linalg.vector_norm((w.T if layer.fan_in_fan_out else w) + update, dim=1)
