"""Sparse updates of linear layers as a tuner of peft: only chosen entries of W train.

    y = (W + Δ) x + b,   Δ = scatter(indices, values),   values: (k,) float32, 0 at first; k differs by layer

An entry outside the indices has no parameter, so neither weight decay nor a moment of the optimizer can move it. W is
never changed: switched off, the layer is the base's. W + Δ is rounded to the type of W, as a merged weight would be. It
is made anew in the forward and in the backward pass and freed at once; of it, only its inputs are kept for the backward
pass: x, as every trained layer keeps it, and (k,) tensors. The gradient of W is made whole, layer after layer, and k
entries of it are picked. So a step costs the products of full fine-tuning and the memory of a few values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from peftctl.tuners._layer_tuner import LayerTuner

TYPE = "PEFTCTL_SPARSE_DELTA"
"""What adapter_config.json calls this tuner."""


@dataclass
class SparseDeltaConfig(PeftConfig):
    """Settings that are saved with the adapter.

    Args:
        counts: Full name of a layer -> k, how many entries of its weight train. Other layers have no adapter.
        target_modules: The names in `counts`, as other tools look for them here.
        exclude_modules: Not used.
        modules_to_save: Modules that train whole beside the values.
    """

    counts: dict[str, int] = field(default_factory=dict)
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TYPE
        self.target_modules = list(self.counts)


class SparseDeltaLayer(nn.Module, BaseTunerLayer):
    """A Linear or a Conv1D with k entries of its weight changed.

    Indices count the entries of the weight as it is stored, row after row.
    """

    adapter_layer_names = ("delta_values",)
    other_param_names = ("delta_indices",)

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.delta_values = nn.ParameterDict()
        self.delta_indices = BufferDict({}, persistent=True)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._before_merge: list[torch.Tensor] = []

    def update_layer(self, adapter_name: str, count: int, inference_mode: bool = False) -> None:
        """Add an adapter over the first `count` entries, until `choose` or a state dict says which."""
        weight = self.weight
        self.delta_values[adapter_name] = nn.Parameter(torch.zeros(count, device=weight.device))
        self.delta_indices[adapter_name] = torch.arange(count, dtype=torch.int32, device=weight.device)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def choose(self, adapter_name: str, indices: torch.Tensor) -> None:
        """Let these entries train: (k,), ascending. Values start at 0 where k is another than before."""
        indices = indices.to(self.weight.device, torch.int32)
        values = self.delta_values[adapter_name]
        if len(indices) != len(values):
            self.delta_values[adapter_name] = nn.Parameter(values.new_zeros(len(indices)), values.requires_grad)
        self.delta_indices[adapter_name] = indices

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (W + Δ) x + b for x of shape (..., d_in)."""
        names = [name for name in self.active_adapters if name in self.delta_values]
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(x)
        base = self.get_base_layer()
        values, indices = self._sum(names)
        result = _Product.apply(x, values, base.weight, indices, isinstance(base, Conv1D))
        return result if base.bias is None else result + base.bias

    def _sum(self, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the values and the indices of the sum of some adapters, each index once."""
        indices = torch.cat([self.delta_indices[name] for name in names]).long()
        values = torch.cat([self.delta_values[name] for name in names])
        if len(names) == 1:
            return values, indices
        indices, place = indices.unique(return_inverse=True)
        return values.new_zeros(len(indices)).index_add(0, place, values), indices

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add Δ to W in place.

        Raises:
            ValueError: A changed entry would not be finite, and `safe_merge` is set.
        """
        flat = self.weight.data.view(-1)
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.delta_values:
                continue
            indices = self.delta_indices[name].long()
            old = flat[indices]
            new = _added(old, self.delta_values[name].detach())
            if safe_merge and not torch.isfinite(new).all():
                raise ValueError(f"the adapter {name} has values that are not finite")
            flat[indices] = new
            self._before_merge.append(old)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put back the entries that merging has changed, exactly."""
        flat = self.weight.data.view(-1)
        while self.merged_adapters:
            flat[self.delta_indices[self.merged_adapters.pop()].long()] = self._before_merge.pop()

    def __repr__(self) -> str:
        return "sparse_delta." + super().__repr__()


class SparseDeltaModel(LayerTuner):
    """Puts a `SparseDeltaLayer` around every layer of `counts`."""

    prefix = "delta_"
    tuner_layer_cls = SparseDeltaLayer

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        return key in peft_config.counts

    def settings(self, config: Any, key: str) -> Sequence[Any]:
        """Return how many values the layer has, and whether they train."""
        return config.counts[key], config.inference_mode


def layers(peft_model: Any) -> Iterator[tuple[str, SparseDeltaLayer]]:
    """Yield the layers with their names in the base model."""
    for name, module in peft_model.get_base_model().named_modules():
        if isinstance(module, SparseDeltaLayer):
            yield name, module


def place(peft_model: Any, indices: Mapping[str, torch.Tensor]) -> None:
    """Choose the entries that train, in place; layers without any become the base's again.

    Args:
        peft_model: With one adapter of this type.
        indices: Name of a layer in the base model -> its entries, (k,), ascending.
    """
    base = peft_model.get_base_model()
    for name, layer in list(layers(peft_model)):
        if name in indices:
            layer.choose("default", indices[name])
        else:
            parent, _, leaf = name.rpartition(".")
            setattr(base.get_submodule(parent), leaf, layer.get_base_layer())
    config = peft_model.peft_config["default"]
    config.counts = {name: len(chosen) for name, chosen in indices.items()}
    config.target_modules = list(config.counts)


class _Product(torch.autograd.Function):
    """x (W + Δ)^T, with gradients for x and the values only."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, values: torch.Tensor, weight: torch.Tensor, indices: torch.Tensor, turned: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(x, values, weight, indices)
        ctx.turned = turned  # a Conv1D stores (d_in, d_out)
        changed = _changed(weight, indices, values)
        return functional.linear(x, changed.T if turned else changed)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:  # type: ignore[override]
        x, values, weight, indices = ctx.saved_tensors
        for_x = for_values = None
        if ctx.needs_input_grad[0]:
            changed = _changed(weight, indices, values)
            for_x = upstream @ (changed.T if ctx.turned else changed)
        if ctx.needs_input_grad[1]:
            flat_x, flat_up = x.flatten(0, -2), upstream.flatten(0, -2)
            for_weight = flat_x.T @ flat_up if ctx.turned else flat_up.T @ flat_x
            for_values = for_weight.view(-1)[indices].to(values.dtype)
        return for_x, for_values, None, None, None


def _changed(weight: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    changed = weight.detach().clone(memory_format=torch.contiguous_format)
    flat = changed.view(-1)
    flat[indices] = _added(flat[indices], values)
    return changed


def _added(entries: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return entries of W plus their values, rounded once."""
    return (entries.to(torch.promote_types(entries.dtype, values.dtype)) + values).to(entries.dtype)
