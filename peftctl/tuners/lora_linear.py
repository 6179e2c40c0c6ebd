"""LoRA layers for training that never copy their input to float32. Saved adapters are stock peft.

    y = W x + (s B) (A x),   A, B: float32 for the optimizer, cast to the dtype of x for the products

peft's own layers cast x to the type of A and keep that float32 copy for the backward pass, once a target. Casting
A: (r, d_in) and B: (d_out, r) instead costs almost nothing. In eval mode the layers are peft's own, kind by kind, so an
adapter answers exactly alike when plain peft has read it back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners import lora
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from peftctl.models.quantize import is_quantized
from peftctl.tuners.lora_products import LoraProducts, fits


def training_layers(model: nn.Module) -> dict[type[nn.Module], type[nn.Module]]:
    """Return base layer -> LoRA layer for `LoraConfig._register_custom_module`; the first that fits is taken."""
    plain: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: LoraLinear, Conv1D: LoraLinear}
    return {**_quantized_layers(), **plain} if is_quantized(model) else plain


class LeanTraining:
    """The training forward, for any of peft's LoRA layers over a matrix."""

    fixed_factors: Any
    """A further term of the update that does not train, see `fixed_factors.py`."""
    training_factors: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None
    """What stands in for A: (r, d_in) and B: (d_out, r) in a training forward; None takes them as they are."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.fixed_factors = None
        self.training_factors = None

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return W x + s B A dropout(x), and s F E x where there are fixed factors, for x of shape (..., d_in)."""
        if self.fixed_factors is not None and not self.disable_adapters:
            return self._with_fixed_factors(x)
        lean = self.training and not args and not kwargs and self._plain()
        return self._lean(x) if lean else super().forward(x, *args, **kwargs)  # type: ignore[misc]

    def _with_fixed_factors(self: Any, x: torch.Tensor) -> torch.Tensor:
        name, a = self.active_adapters[0], self.lora_A[self.active_adapters[0]].weight
        down, up = self.fixed_factors.beside(a, self.lora_B[name].weight)
        if self.training and self._products_of(x):
            return self._products(x, down, up)
        wide = x if self.training else x.to(a.dtype)
        down, up = down.to(wide.dtype), (up * self.scaling[name]).to(wide.dtype)
        low = functional.linear(self.lora_dropout[name](wide), down[: len(a)])
        low = torch.cat([low, functional.linear(wide, down[len(a) :])], dim=-1)
        result: torch.Tensor = self.base_layer(x)
        return (result + functional.linear(low, up)).to(result.dtype)

    def _lean(self: Any, x: torch.Tensor) -> torch.Tensor:
        name = self.active_adapters[0]
        a: torch.Tensor = self.lora_A[name].weight
        b: torch.Tensor = self.lora_B[name].weight
        if self.training_factors is not None:
            a, b = self.training_factors(a, b)
        if self._products_of(x):
            return self._products(x, a, b)
        a, b = a.to(x.dtype), (b * self.scaling[name]).to(x.dtype)
        return self.base_layer(x) + functional.linear(functional.linear(self.lora_dropout[name](x), a), b)

    def _products(self: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        base, scale = self.base_layer, self.scaling[self.active_adapters[0]]
        result: torch.Tensor = LoraProducts.apply(x, a, b, scale, base.weight, base.bias)
        return result

    def one_operation(self: Any, dtype: torch.dtype) -> bool:
        """Whether the layer and its LoRA are one operation in a training forward on x of a type."""
        plain_dropout = isinstance(self.lora_dropout[self.active_adapters[0]], nn.Identity)
        return plain_dropout and self._plain() and fits(self.base_layer, dtype)

    def _products_of(self: Any, x: torch.Tensor) -> bool:
        return self.one_operation(x.dtype) and not torch.is_autocast_enabled(x.device.type)

    def _plain(self: Any) -> bool:
        one_plain_adapter = len(self.active_adapters) == 1 and not self.lora_variant
        return one_plain_adapter and not (self.disable_adapters or self.merged)


class LoraLinear(LeanTraining, lora.Linear):
    """peft's LoRA layer over a Linear or a Conv1D with a leaner training forward."""

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any):
        super().__init__(base_layer, *args, **kwargs)
        # peft's configuration has one flag for all layers, and a model can have targets of both kinds.
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)


def _quantized_layers() -> dict[type[nn.Module], type[nn.Module]]:
    # bitsandbytes takes a second to import, and most runs do without.
    from bitsandbytes import nn as quantized
    from peft.tuners.lora import bnb

    class LoraLinear4bit(LeanTraining, bnb.Linear4bit):
        """The same over 4-bit weights."""

    class LoraLinear8bit(LeanTraining, bnb.Linear8bitLt):
        """The same over 8-bit weights."""

    return {quantized.Linear4bit: LoraLinear4bit, quantized.Linear8bitLt: LoraLinear8bit}
