"""LoRA layers whose A does not train, and the gradient of B that moves B A like the full gradient projected by A."""

from __future__ import annotations

from typing import Any

import torch


def freeze_a(layer: Any) -> None:
    """Turn A of a LoRA layer of peft into a buffer of the same name, in place.

    peft sets requires_grad of every parameter of an adapter whenever one is switched on; it can't reach a buffer.
    """
    linear = layer.lora_A["default"]
    weight = linear.weight.detach()
    del linear.weight
    linear.register_buffer("weight", weight)


def correct_gradients(layer: Any) -> None:
    """Multiply every gradient of B: (d_out, r) by (A A^T)^-1 / s^2, in place of the layer's plain one.

    The map is linear, so it holds under accumulation.
    """
    linear, scale = layer.lora_A["default"], layer.scaling["default"]
    inverse = _Inverse(linear, scale)
    for parameter in layer.lora_B.parameters():
        parameter.register_hook(lambda gradient: gradient @ inverse.like(gradient))


class _Inverse:
    """(A A^T)^+ / s^2: (r, r), computed once for every value that A takes."""

    def __init__(self, linear: torch.nn.Module, scale: float):
        self.linear = linear
        self.scale = scale
        self.seen: tuple[torch.Tensor, int] | None = None
        self.value = torch.empty(0)

    def like(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return it in the type and on the device of a gradient."""
        a: torch.Tensor = self.linear.weight  # type: ignore[assignment]
        if self.seen is None or self.seen[0] is not a or self.seen[1] != a._version:
            wide = a.cpu().double()  # not every device has float64
            self.seen = (a, a._version)
            self.value = torch.linalg.pinv(wide @ wide.T, hermitian=True) / self.scale**2
        self.value = self.value.to(gradient)
        return self.value
