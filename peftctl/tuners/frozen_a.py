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
    """Let B: (d_out, r) of a layer get its gradient times (A A^T)^-1 / s^2.

    The map is linear, so it holds under accumulation; it is part of the forward pass, so it holds for every engine that
    divides B among processes.
    """
    layer.training_factors = _CorrectedB(layer.scaling["default"])


class _CorrectedB:
    """A and B of a LoRA layer in training; (A A^T)^+ / s^2: (r, r), is computed once for every value that A takes."""

    def __init__(self, scale: float):
        self.scale = scale
        self.seen: tuple[torch.Tensor, int] | None = None
        self.inverse = torch.empty(0)

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A: (r, d_in) and B: (d_out, r), equal to those given."""
        if self.seen is None or self.seen[0] is not a or self.seen[1] != a._version:
            wide = a.cpu().double()  # not every device has float64
            self.seen = (a, a._version)
            self.inverse = torch.linalg.pinv(wide @ wide.T, hermitian=True) / self.scale**2
        self.inverse = self.inverse.to(b)
        return a, _WithGradientTimes.apply(b, self.inverse)


class _WithGradientTimes(torch.autograd.Function):
    """The identity of B: (d_out, r), whose gradient is multiplied by a matrix (r, r) from the right."""

    @staticmethod
    def forward(ctx: Any, b: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(matrix)
        return b.view_as(b)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (matrix,) = ctx.saved_tensors
        return upstream @ matrix, None
