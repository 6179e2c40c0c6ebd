"""What the parts of a union share: they are children of the modules that they change, and act by hooks.

A part wraps nothing. So the names of the base stay as they are, several parts may stand at one module or inside of each
other's (a prefix at attention, factors at its projections), and none knows of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.hooks import RemovableHandle


class Part(nn.Module, BaseTunerLayer):
    """A child of a base module; `union_parts` holds what each adapter has there."""

    adapter_layer_names = ("union_parts",)
    kind: ClassVar[str]
    """What it is called in the configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.union_parts = nn.ModuleDict()
        self.handles: list[RemovableHandle] = []
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def attach(self, target: nn.Module, model: nn.Module, settings: Any, key: str) -> None:
        """Hook up with a module of the model, and with others that it reads."""
        raise NotImplementedError

    def make(self, target: nn.Module, settings: Any, gate: Callable[[int], nn.Module] | None) -> nn.Module:
        """Return what an adapter has here, in its initial state; `gate` makes a gate that reads so many numbers."""
        raise NotImplementedError

    def detach(self) -> None:
        """Leave no trace in the base."""
        for handle in self.handles:
            handle.remove()

    def running(self) -> Any:
        """Return what the active adapter has here, or None.

        Raises:
            NotImplementedError: Several adapters are active.
        """
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.union_parts]
        if len(names) > 1:
            raise NotImplementedError("unions of parts run one at a time")
        return self.union_parts[names[0]] if names else None

    def get_base_layer(self) -> nn.Module:
        """Return a module without weights: a part stands beside the base's, not around them."""
        return nn.Identity()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("a union of parts can't be merged: not all of them are linear")
