"""What the fixtures share: where a number comes from, how it is drawn, how two sides are compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Given = Mapping[str, Tensor]
"""The numbers both sides start from: weights, inputs, upstream gradients."""


@dataclass(frozen=True)
class Fixture:
    """One method's comparison.

    Attributes:
        seed: Of every number drawn.
        source: Authors, year, arXiv id and the equations that `naive` computes.
        shapes: Of the layer and its input, in words.
        config: The method section that the product's side runs with.
        tolerance: Largest relative difference that counts as equal.
        reason: Why it is more than 1e-9, if it is.
    """

    seed: int
    source: str
    shapes: str
    config: Mapping[str, object]
    tolerance: float = 1e-9
    reason: str = ""

    def generator(self) -> torch.Generator:
        """A generator at the beginning of this fixture's numbers."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class Values:
    """What one side has computed, by name."""

    outputs: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """How far two sides are apart.

    Attributes:
        outputs: Largest relative difference of an output.
        gradients: Largest relative difference of a gradient.
        names: The tensors above the tolerance, worst first.
        equal: Whether there are none.
    """

    outputs: float
    gradients: float
    names: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether every tensor is within the tolerance."""
        return not self.names


def normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    """Draw a float64 tensor from N(0, scale^2)."""
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def differentiate(output: Tensor, upstream: Tensor | None, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of sum(output * upstream) for the wanted tensors.

    Args:
        output: Of any shape; a number where `upstream` is None.
        upstream: Of the output's shape.
        wanted: Leaves that require gradients.
    """
    found = torch.autograd.grad(output, list(wanted.values()), upstream)
    return dict(zip(wanted, found, strict=True))


def total(parts: Iterable[Tensor]) -> Tensor:
    """The sum of tensors of one shape."""
    return torch.stack(list(parts)).sum(0)


def leaf(tensor: Tensor) -> Tensor:
    """A copy that autograd differentiates for."""
    return tensor.detach().clone().requires_grad_()


def relative(ours: Tensor, naive: Tensor) -> float:
    """Largest difference as a share of the largest naive entry (absolute where that is 0); inf where shapes differ."""
    if ours.shape != naive.shape:
        return float("inf")
    ours, naive = ours.detach().double(), naive.detach().double()
    if not bool(torch.isfinite(ours).all()):
        return float("inf")
    size = naive.abs().max().item() if naive.numel() else 0.0
    return ((ours - naive).abs().max().item() if naive.numel() else 0.0) / (size or 1.0)


def compare(fixture: Fixture, ours: Values, naive: Values) -> Difference:
    """Compare tensor by tensor; a name that only one side has is infinitely far."""
    apart: dict[str, float] = {}
    largest = {}
    for kind in ("outputs", "gradients"):
        left, right = getattr(ours, kind), getattr(naive, kind)
        found = {
            name: relative(left[name], right[name]) if name in left and name in right else float("inf")
            for name in sorted({*left, *right})
        }
        largest[kind] = max(found.values(), default=0.0)
        apart |= {f"{kind}.{name}": value for name, value in found.items() if not value <= fixture.tolerance}
    return Difference(largest["outputs"], largest["gradients"], tuple(sorted(apart, key=lambda name: -apart[name])))
