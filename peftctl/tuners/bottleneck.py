"""Bottleneck adapters as a tuner of peft: a small perceptron beside a layer, behind it, or around a whole block.

Placement says what the adapter reads and where its change is added; `perceptrons.py` and its kin say what it computes.

    behind   h + s change(h),  h = W x + b: behind a linear layer, as a rule the one that ends a sublayer
    beside   h + s change(x),  x: what the first layer of the feed-forward part reads, h: what its last one returns
    around   y + s change(y),  y: the residual stream where a block ends; or where a block ends with a LayerNorm of the
             sum z of both: LN(z + s change(LN(z))), Pfeiffer et al. 2020
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftctl.tuners._kinds import KINDS
from peftctl.tuners._layer_tuner import LayerTuner
from peftctl.tuners.fused_perceptrons import FrozenPerceptrons

TYPE = "PEFTCTL_BOTTLENECK"
"""What adapter_config.json calls this tuner."""


@dataclass
class BottleneckConfig(PeftConfig):
    """Settings that are saved with the adapter.

    Args:
        bottleneck: m.
        activation: φ, by its name in transformers.
        init_std: Standard deviation of D before it is cut off; None draws it as a new linear layer.
        up_std: The same of U; 0 lets it start at zero.
        placement: Where adapters stand.
        scaling: s.
        kind: What an adapter computes, a key of `_kinds.KINDS`.
        options: Settings of that kind.
        reads: Target -> the layer whose input its adapter reads, for `beside`.
        width: d, where it can't be read off a target: for blocks.
        target_modules: What adapters follow: linear layers, or for `around` blocks or LayerNorms.
        exclude_modules: Exceptions from it.
        modules_to_save: Modules that train whole beside the adapters.
    """

    bottleneck: int = 64
    activation: str = "gelu"
    init_std: float | None = 1e-3
    up_std: float | None = 0.0
    placement: Literal["behind", "beside", "around"] = "behind"
    scaling: float = 1.0
    kind: str = "plain"
    options: dict[str, Any] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)
    width: int | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TYPE


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A linear layer of d outputs with an adapter behind it."""

    adapter_layer_names: tuple[str, ...] = ("bottleneck_adapter",)

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_adapter = nn.ModuleDict()
        self.scalings: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter in its initial state."""
        width = config.width or _width(self.get_base_layer())
        self.bottleneck_adapter[adapter_name] = KINDS[config.kind](width, config)  # type: ignore[call-arg]
        self.scalings[adapter_name] = config.scaling
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _freeze_non_trainable_peft_weights(self, adapter_names: Any = None) -> None:
        """Keep finished adapters as they are; peft calls this wherever it has made an adapter trainable."""
        super()._freeze_non_trainable_peft_weights(adapter_names)
        for module in self.bottleneck_adapter.modules():
            if isinstance(module, FrozenPerceptrons):
                module.requires_grad_(False)

    def changed(self, h: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        """Return h, (..., d), plus the changes of the active adapters, one after the other.

        Args:
            h: What they are added to.
            x: What they read, (..., d); None for h itself, as those before have left it.
        """
        if self.disable_adapters:
            return h
        for name in self.running():
            change, s = self.bottleneck_adapter[name](h if x is None else x), self.scalings[name]
            h = h + (change if s == 1 else s * change)
        return h

    def running(self) -> list[str]:
        """Return the adapters that add their change: the active ones."""
        return [name for name in self.active_adapters if name in self.bottleneck_adapter]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return h + s change(h), h = W x + b, for x of shape (..., d_in)."""
        return self.changed(self.base_layer(x, *args, **kwargs))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: there is no matrix that computes the same.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("a bottleneck adapter is not linear: no weight of the base can take it up")

    def __repr__(self) -> str:
        return "bottleneck." + super().__repr__()


class BesideLayer(BottleneckLayer):
    """The last linear layer of a feed-forward part, with an adapter beside the whole part."""

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.read: torch.Tensor | None = None

    def remember(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Before the first layer of the part: keep what it reads."""
        self.read = args[0]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return h + s change(x'), with x' of (..., d) what the first layer of the part has read."""
        read, self.read = self.read, None
        return self.changed(self.base_layer(x, *args, **kwargs), read)


class AroundLayer(BottleneckLayer):
    """A block, or the last sublayer of one, that returns the residual stream; or the LayerNorm that ends a block."""

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        if not isinstance(base_layer, nn.LayerNorm):
            # On the block and before all other hooks: those that record hidden states must see what the next block
            # does, and a block that computes its activations again takes the adapter's with them.
            self.hook = base_layer.register_forward_hook(self.after, prepend=True)

    def __getattr__(self, name: str) -> Any:
        """Answer for the block: models ask their blocks for attributes, such as the kind of their attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def after(self, block: nn.Module, args: Any, result: Any) -> Any:
        """Return y + s change(y) for what a block returns: y, (..., d), alone or first among other things."""
        if isinstance(result, tuple):
            return self.changed(result[0]), *result[1:]
        return self.changed(result)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the block returns, changed; or LN(x + s change(LN(x))), (..., d)."""
        base = self.base_layer
        result = base(x, *args, **kwargs)
        if isinstance(base, nn.LayerNorm):
            changed = self.changed(x, result)
            return result if changed is x else base(changed)
        return result

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: Any) -> nn.Module:
        """Return the block as it was; peft calls this where it unloads.

        Raises:
            NotImplementedError: It is to be merged.
        """
        if merge:
            self.merge(safe_merge, adapter_names)
        if not isinstance(self.base_layer, nn.LayerNorm):
            self.hook.remove()
        return self.get_base_layer()


class BottleneckModel(LayerTuner):
    """Puts a `BottleneckLayer` around every target."""

    prefix = "bottleneck_"
    tuner_layer_cls: type[BottleneckLayer] = BottleneckLayer
    placements: dict[str, type[BottleneckLayer]] = {  # noqa: RUF012
        "behind": BottleneckLayer,
        "beside": BesideLayer,
        "around": AroundLayer,
    }

    def around(self, target: nn.Module, config: Any, key: str) -> Any:
        """Return the layer around a target, without an adapter; one beside its part hears what that reads."""
        layer = self.placements[config.placement](target)
        if isinstance(layer, BesideLayer):
            self.model.get_submodule(config.reads[key]).register_forward_pre_hook(layer.remember)
        return layer

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a layer around a module, or a module back; peft would look for the weight of a block that comes back."""
        if isinstance(child, AroundLayer):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Return a key as it is saved: an adapter is a module, so its name stands in the middle."""
        key = key.replace(f".bottleneck_adapter.{adapter_name}.", ".bottleneck_adapter.")
        return super()._remove_adapter_name_from_key(key, adapter_name)  # type: ignore[no-any-return]


def _width(layer: nn.Module) -> int:
    """Return d, the outputs of a linear layer, also of a quantised one, or the width of a LayerNorm."""
    if isinstance(layer, nn.LayerNorm):
        return layer.normalized_shape[0]
    width = layer.nf if isinstance(layer, Conv1D) else layer.out_features
    assert isinstance(width, int)
    return width
