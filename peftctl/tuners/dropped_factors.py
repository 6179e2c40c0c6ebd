"""Low-rank factors of which a random part is dropped: in training at every forward, and as members of an ensemble.

    y = W x + s (B m_out) (A m_in) x,   m_in: (d_in,) over the columns of A, m_out: (d_out,) over the rows of B

Entries of the masks are 0 with probability p and else 1 / (1 - p), drawn for each layer and forward, the same for all
tokens; the rank is never dropped. The factors are masked, which equals masking x and the result: it keeps vectors for
the backward pass in place of copies of x: (batch, seq, d_in) and of the result, and B A is never built. Outside of
training the layers are peft's own, without masks: the mean module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.adalora import AdaLoraLayer, SVDLinear
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional

from peftctl.tuners.lora_linear import LeanTraining


@dataclass(frozen=True)
class DropFactors:
    """Drops columns of A and rows of B with new masks at every call."""

    p: float

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A: (r, d_in) and B: (d_out, r), masked.

        The masks come from the default generator: gradient checkpointing, which restores it, recomputes the same.
        """
        if not self.p:
            return a, b
        columns = functional.dropout(a.new_ones(a.shape[1]), self.p)
        rows = functional.dropout(b.new_ones(b.shape[0], 1), self.p)
        return a * columns, b * rows


class LeanSVDLinear(SVDLinear):
    """peft's AdaLoRA layer with a training forward that masks its factors and never copies x to float32."""

    training_factors: DropFactors

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return W x + s P diag(lambda) Q dropout(x) for x of shape (..., d_in)."""
        if not self.training or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        name = self.active_adapters[0]
        factors: Any = self.lora_A[name], self.lora_B[name]
        q, p = self.training_factors(*factors)
        scale = self.scaling[name] / (self.ranknum[name] + 1e-5)  # peft's
        low = functional.linear(self.lora_dropout[name](x), (q * self.lora_E[name]).to(x.dtype))
        result: torch.Tensor = self.base_layer(x)
        return result + functional.linear(low, (p * scale).to(x.dtype))


def drop_in_training(model: nn.Module, p: float) -> None:
    """Let the LoRA or AdaLoRA layers of a new adapter drop columns and rows in training, in place."""
    for layer in model.modules():
        if isinstance(layer, SVDLinear):
            # peft makes its layers by their base's type and can't be told of another kind; ours has the same tensors.
            layer.__class__ = LeanSVDLinear
        if isinstance(layer, LeanTraining | LeanSVDLinear):
            layer.training_factors = DropFactors(p)


class Members:
    """An ensemble of one adapter's modules, each with masks of its own that stay.

    Args:
        model: A PeftModel with a LoRA or AdaLoRA adapter of any origin.
        p: Share of the columns of A, and of the rows of B, that a member lacks.
        count: How many members.
        seed: Of the masks, which are drawn on the CPU: they are the same on every device.
    """

    def __init__(self, model: nn.Module, p: float, count: int, seed: int):
        self.factors = list(_factors(model))
        generator = torch.Generator().manual_seed(seed)
        self.masks = [[_mask(f, dim, p, generator) for f, dim in self.factors] for _ in range(count)]

    def __iter__(self) -> Iterator[None]:
        """Turn the model into one member after the other; afterwards it is itself."""
        for masks in self.masks:
            with self._masked(masks):
                yield

    @contextmanager
    def _masked(self, masks: list[torch.Tensor]) -> Iterator[None]:
        whole = [factor.data for factor, _ in self.factors]
        try:
            for (factor, _), mask in zip(self.factors, masks, strict=True):
                factor.data = factor.data * mask
            yield
        finally:
            for (factor, _), data in zip(self.factors, whole, strict=True):
                factor.data = data


def _factors(model: nn.Module) -> Iterator[tuple[Any, int]]:
    """Yield A with the dimension of its columns, and B with that of its rows, of every layer."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name in layer.active_adapters:
                a, b = layer.lora_A[name], layer.lora_B[name]
                yield (a if isinstance(layer, AdaLoraLayer) else a.weight), 1
                yield (b if isinstance(layer, AdaLoraLayer) else b.weight), 0


def _mask(factor: torch.Tensor, dim: int, p: float, generator: torch.Generator) -> torch.Tensor:
    """Return a mask that broadcasts over a factor, in its type and on its device."""
    shape = [1, 1]
    shape[dim] = factor.shape[dim]
    return (torch.rand(shape, generator=generator) >= p).to(factor) / (1 - p)
