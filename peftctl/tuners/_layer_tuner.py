"""What our own tuners share: how peft puts a layer of ours around a target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn


class LayerTuner(BaseTuner):
    """Puts a layer of `tuner_layer_cls` around every target, and an adapter into it with its `update_layer`."""

    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # peft's name and type

    def around(self, target: nn.Module, config: Any, key: str) -> Any:
        """Return the layer around a target of this name in the base model, without an adapter."""
        return self.tuner_layer_cls(target)  # type: ignore[call-arg]

    def settings(self, config: Any, key: str) -> Sequence[Any]:
        """Return what `update_layer` of the layer of this name is told besides the adapter's name."""
        return (config,)

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
        settings = self.settings(peft_config, current_key)
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, *settings)  # type: ignore[operator]
            return
        layer = self.around(target, peft_config, current_key)
        layer.set_adapter(adapter_name)
        layer.update_layer(adapter_name, *settings)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)
