"""What layers with a mixture of experts share: a router that weighs experts token by token, and who may look at it.

    p = softmax(R x),   R: (E, d_in), no bias, x: (..., d_in)
    gates: p itself (dense), or the k largest of p and 0 for the others (top-k), which may be scaled to the sum 1

The product with R is in the type of x, the softmax in float32 or wider. Top-k is a mask over all experts: their
products are low-rank, so that a mask needs less memory than copies of the tokens of each expert, and no expert's
tensors are ever without a gradient, which processes that train together would wait for. What a token did not choose
gets a gradient of exactly 0 from it; `methods/_routed.py` keeps the optimizer from moving experts that nobody chose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from peftctl.tuners._layer_tuner import LayerTuner

Init = Literal["kaiming", "normal"]
STD = 0.02
"""Of the normal distribution that A and R may be drawn from."""


@dataclass(frozen=True)
class Routing:
    """How a layer routed the tokens of one forward pass; both still have their graph.

    Args:
        probabilities: p, (..., E), in float32 or wider.
        gates: What the experts were weighed with, (..., E).
    """

    probabilities: torch.Tensor
    gates: torch.Tensor


def route(x: torch.Tensor, router: torch.Tensor, k: int | None = None, renormalise: bool = False) -> Routing:
    """Return how tokens choose.

    Args:
        x: (..., d_in).
        router: R, (E, d_in).
        k: How many experts a token has; None for all.
        renormalise: Whether the gates of top-k sum to 1.
    """
    logits = functional.linear(x, router.to(x.dtype))
    p = logits.softmax(dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
    if k is None:
        return Routing(p, p)
    values, chosen = p.topk(k, dim=-1)
    if renormalise:
        values = values / values.sum(dim=-1, keepdim=True)
    return Routing(p, torch.zeros_like(p).scatter(-1, chosen, values))


def draw(tensor: torch.Tensor, init: Init) -> None:
    """Fill A or R, (rows, d_in), in place: U(-1/sqrt(d_in), 1/sqrt(d_in)), or N(0, 0.02^2)."""
    if init == "kaiming":
        nn.init.kaiming_uniform_(tensor, a=5**0.5)
    else:
        nn.init.normal_(tensor, std=STD)


def widths(layer: nn.Module) -> tuple[int, int]:
    """Return (d_in, d_out) of a linear layer, also of a quantised one."""
    found = (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)
    return found  # type: ignore[return-value]


class RoutedLayer(nn.Module, BaseTunerLayer):
    """A linear layer with experts beside it. Subclasses name their dictionary of experts in `adapter_layer_names`."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.listener: Callable[[Routing], None] | None = None
        """Called with the routing of every forward pass; `recording` sets it."""

    @property
    def experts(self) -> nn.ModuleDict:
        """The experts of every adapter, by its name."""
        return getattr(self, self.adapter_layer_names[0])  # type: ignore[no-any-return]

    def add(self, adapter_name: str, experts: nn.Module, inference_mode: bool) -> None:
        """Put experts in their initial state beside the layer."""
        self.experts[adapter_name] = experts
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def active(self) -> list[nn.Module]:
        """Return the experts of the adapters that are switched on."""
        if self.disable_adapters:
            return []
        return [self.experts[name] for name in self.active_adapters if name in self.experts]

    def told(self, routing: Routing) -> None:
        """Pass on what the router did."""
        if self.listener is not None:
            self.listener(routing)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: there is no matrix that computes the same.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("every token weighs the experts anew: no weight of the base can take them up")


class RoutedModel(LayerTuner):
    """Puts a layer of `tuner_layer_cls` around every target."""

    def settings(self, config: Any, key: str) -> Sequence[Any]:
        """Return the configuration and the layer's name, which may have experts of its own number."""
        return config, key


def layers(peft_model: Any) -> dict[str, RoutedLayer]:
    """Return the layers with experts, by their names in the base model."""
    named = peft_model.get_base_model().named_modules()
    return {name: module for name, module in named if isinstance(module, RoutedLayer)}


@contextmanager
def recording(peft_model: Any) -> Iterator[dict[str, Routing]]:
    """Yield a dictionary that a forward pass inside fills: name of a layer -> its routing.

    The backward pass must be outside: where activations are recomputed, a layer runs again there, and what it would
    tell then keeps the recomputed activations alive.
    """
    found: dict[str, Routing] = {}
    listening = layers(peft_model)
    for name, layer in listening.items():
        layer.listener = partial(found.__setitem__, name)
    try:
        yield found
    finally:
        for layer in listening.values():
            layer.listener = None
