"""One adapter of several parts, a tuner of peft: prefixes, low-rank factors and bottleneck adapters in one PeftModel.

A part names its kind, its targets and its settings; the same kind may come several times, with other settings for
other layers. Each may be gated by its input (`gates.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from peftctl.models.attentions import stack_of
from peftctl.tuners._parts import Part
from peftctl.tuners.added import (
    BiasPart,
    BiasSettings,
    BottleneckPart,
    BottleneckSettings,
    LowRankPart,
    LowRankSettings,
)
from peftctl.tuners.gates import Gate, Padding
from peftctl.tuners.kv_prefix import KvPrefix, PrefixSettings

TYPE = "PEFTCTL_UNION"
"""What adapter_config.json calls this tuner."""

PARTS: dict[str, tuple[type[Part], type]] = {
    KvPrefix.kind: (KvPrefix, PrefixSettings),
    LowRankPart.kind: (LowRankPart, LowRankSettings),
    BottleneckPart.kind: (BottleneckPart, BottleneckSettings),
    BiasPart.kind: (BiasPart, BiasSettings),
}
"""Kind -> what stands at a target, and its settings."""


@dataclass
class UnionConfig(PeftConfig):
    """Settings that are saved with the adapter.

    Args:
        parts: Of each part `part` (a kind), `targets` (names or ends of names of modules), `settings` (fields of the
            kind's settings), and where it is gated `gate`: `over` and `std` of `gates.Gate`.
        target_modules: The targets of all parts.
        exclude_modules: Exceptions from it.
        modules_to_save: Modules that train whole beside the parts.
    """

    parts: list[dict[str, Any]] = field(default_factory=list)
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TYPE
        if self.target_modules is None:
            self.target_modules = sorted({target for part in self.parts for target in part["targets"]})


class UnionModel(BaseTuner):
    """Puts every part at its targets."""

    prefix = "union_parts"
    tuner_layer_cls = Part
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # peft's name and type

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        for part in peft_config.parts:
            if any(current_key == end or current_key.endswith("." + end) for end in part["targets"]):
                self._add(part, adapter_name, target, current_key, peft_config.inference_mode)

    def _add(self, part: dict[str, Any], adapter_name: str, target: nn.Module, key: str, inference: bool) -> None:
        kind, form = PARTS[part["part"]]
        settings = form(**part["settings"])
        child = f"added_{kind.kind}"
        layer: Any = dict(target.named_children()).get(child)
        if layer is None:
            layer = kind()
            layer.attach(target, self.model, settings, key)
            target.add_module(child, layer)
            layer.set_adapter(adapter_name)
        if adapter_name in layer.union_parts:
            raise ValueError(f"parts: two of kind {kind.kind} at {key}")
        gate = None if part.get("gate") is None else partial(self._gate, key, **part["gate"])
        device = next(iter([*target.parameters(), *self.model.parameters()])).device
        layer.union_parts[adapter_name] = layer.make(target, settings, gate).to(device)
        layer.set_adapter(layer.active_adapters, inference_mode=inference)
        if adapter_name not in self.active_adapters:
            layer.union_parts[adapter_name].requires_grad_(False)

    def _gate(self, key: str, width: int, *, over: Any, std: float | None) -> nn.Module:
        return Gate(width, over, std, self._padding(stack_of(self.model, key)) if over == "mean" else None)

    def _padding(self, name: str) -> Padding:
        """Return what knows the padding of a stack of blocks, one for all gates in it."""
        stack = self.model.get_submodule(name)
        for hook in stack._forward_pre_hooks.values():
            if isinstance(known := getattr(hook, "__self__", None), Padding):
                return known
        padding = Padding()
        stack.register_forward_pre_hook(padding.remember, with_kwargs=True)
        return padding

    def unload(self) -> nn.Module:
        """Return the base without any part, and without its hooks."""
        for module in list(self.model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, Part):
                    child.detach()
                    delattr(module, name)
            for key, hook in list(module._forward_pre_hooks.items()):
                if isinstance(getattr(hook, "__self__", None), Padding):
                    del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
        return super().unload()

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError("a union of parts can't be merged: not all of them are linear")

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Return a key as it is saved: a part is a module, so its adapter's name stands in the middle."""
        key = key.replace(f".union_parts.{adapter_name}.", ".union_parts.")
        return super()._remove_adapter_name_from_key(key, adapter_name)  # type: ignore[no-any-return]


def flatten_prefixes(model: nn.Module) -> None:
    """Replace every network that makes a prefix by the table it makes, in place, also in the configuration."""
    for module in model.modules():
        if isinstance(module, KvPrefix):
            for table in module.union_parts.values():
                table.flatten()  # type: ignore[operator]
    config: Any = model.peft_config["default"]  # type: ignore[index]
    for part in config.parts:
        if part["part"] == KvPrefix.kind:
            part["settings"]["hidden"] = None
