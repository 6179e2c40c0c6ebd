"""Parts of a union that add something to what a module returns: low-rank factors, bottleneck adapters, biases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from peftctl.models.anatomy import widths
from peftctl.tuners._kinds import KINDS
from peftctl.tuners._parts import Part


@dataclass
class LowRankSettings:
    """How factors are saved: r, and what B A x is multiplied by besides the gate."""

    r: int
    scaling: float = 1.0


@dataclass
class BottleneckSettings:
    """How a bottleneck adapter is saved: fields as in `bottleneck.py`, whose placements these are."""

    bottleneck: int
    activation: str
    init_std: float | None = None
    up_std: float | None = 0.0
    placement: Literal["behind", "beside", "around"] = "behind"
    scaling: float = 1.0
    kind: str = "plain"
    options: dict[str, Any] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)
    width: int | None = None


@dataclass
class BiasSettings:
    """A change of a bias has no settings."""


class LowRank(nn.Module):
    """B A x, A: (r, d_in), B: (d_out, r), drawn as LoRA's: A Kaiming-uniformly, B zero."""

    def __init__(self, d_in: int, d_out: int, r: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(r, d_in))
        self.b = nn.Parameter(torch.zeros(d_out, r))
        nn.init.kaiming_uniform_(self.a, a=5**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., d_out) for x of (..., d_in), in the type of x."""
        return functional.linear(functional.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))


class Added(nn.Module):
    """s g(x) change(x)."""

    def __init__(self, change: nn.Module, scaling: float, gate: nn.Module | None) -> None:
        super().__init__()
        self.change = change
        self.gate = gate
        self.scaling = scaling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what is added, for x of (..., d)."""
        change = self.change(x)
        if self.gate is not None:
            change = self.gate(x) * change
        return change if self.scaling == 1 else self.scaling * change


class LowRankPart(Part):
    """Factors beside a linear layer: W x + s g(x) B A x."""

    kind = "low_rank"

    def attach(self, target: nn.Module, model: nn.Module, settings: Any, key: str) -> None:
        """Stand behind every call of the layer."""
        self.handles = [target.register_forward_hook(self.add)]

    def make(self, target: nn.Module, settings: Any, gate: Callable[[int], nn.Module] | None) -> nn.Module:
        """Return factors for the layer."""
        d_in, d_out = widths(target)
        return Added(LowRank(d_in, d_out, settings.r), settings.scaling, None if gate is None else gate(d_in))

    def add(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """Return W x + s g(x) B A x."""
        added = self.running()
        if added is None:
            return output
        return output + added(args[0]).to(output.dtype)


class BottleneckPart(Part):
    """A bottleneck adapter behind, beside or around a module, as `bottleneck.py` has it."""

    kind = "bottleneck"

    def __init__(self) -> None:
        super().__init__()
        self.placement = "behind"
        self.read: torch.Tensor | None = None

    def attach(self, target: nn.Module, model: nn.Module, settings: Any, key: str) -> None:
        """Stand behind every call of the module; beside a feed-forward part, also before its first layer."""
        self.placement = settings.placement
        self.handles = [target.register_forward_hook(self.add)]
        if self.placement == "beside":
            first = model.get_submodule(settings.reads[key])
            self.handles.append(first.register_forward_pre_hook(self.remember))

    def make(self, target: nn.Module, settings: Any, gate: Callable[[int], nn.Module] | None) -> nn.Module:
        """Return an adapter of the kind that the settings name."""
        width = settings.width or widths(target)[1]
        change = KINDS[settings.kind](width, settings)  # type: ignore[call-arg]
        return Added(change, settings.scaling, None if gate is None else gate(width))

    def remember(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Before the first layer of the part: keep what it reads."""
        self.read = args[0]

    def add(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> Any:
        """Return the output with the adapter's change."""
        read, self.read = self.read, None
        added = self.running()
        if added is None:
            return output
        if isinstance(module, nn.LayerNorm) and self.placement == "around":
            return module.forward(args[0] + added(output))
        if isinstance(output, tuple):
            return output[0] + added(output[0]), *output[1:]
        return output + added(output if read is None else read)


class Shift(nn.Module):
    """δ, (d_out,), 0 at first."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(size))


class BiasPart(Part):
    """A change of the bias of a linear layer or a norm: W x + (b + δ)."""

    kind = "bias"

    def attach(self, target: nn.Module, model: nn.Module, settings: Any, key: str) -> None:
        """Stand behind every call of the module."""
        self.handles = [target.register_forward_hook(self.add)]

    def make(self, target: nn.Module, settings: Any, gate: Callable[[int], nn.Module] | None) -> nn.Module:
        """Return δ."""
        bias: Any = target.bias
        return Shift(len(bias))

    def add(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """Return the output plus δ."""
        part = self.running()
        return output if part is None else output + part.shift.to(output.dtype)
