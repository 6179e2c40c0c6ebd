"""Trained vectors at any place of a row, as a tuner of peft around the input embedding.

    e(i) = P[i - first_token]   for the n ids from first_token on, the placeholders: P: (n, d)
    e(i) = E(i)                 for every other id, as the base reads it

Every placeholder has an id of its own, so where it stands, in which turn and behind which cache makes no difference,
and rows keep their length: masks, positions and labels need nothing. Placeholders may lie beyond the base's
vocabulary, whose head can't write them then. In training a network may make P; what is saved is P.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peftctl.tuners._layer_tuner import LayerTuner

TYPE = "PEFTCTL_PROMPT_SLOTS"
"""What adapter_config.json calls this tuner."""


@dataclass
class PromptSlotsConfig(PeftConfig):
    """Settings that are saved with the adapter.

    Args:
        slots: n.
        first_token: Id of the first placeholder; those of the others follow.
        stand_in: A token of the base, which placeholders are read as while the adapter is off.
        target_modules: The input embedding.
        exclude_modules: Exceptions from it.
        modules_to_save: None train beside it; peft wants the field.
    """

    slots: int = 1
    first_token: int = 0
    stand_in: int = 0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TYPE


class SlotTable(nn.Module):
    """P itself, (n, d); 0 until values are loaded."""

    def __init__(self, slots: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(slots, width))

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the rows at some indices, (..., d)."""
        return self.weight[indices]


class PromptSlotsLayer(nn.Module, BaseTunerLayer):
    """An input embedding whose placeholders read vectors of their own."""

    adapter_layer_names = ("prompt_slots",)

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.prompt_slots = nn.ModuleDict()
        self.configs: dict[str, PromptSlotsConfig] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: PromptSlotsConfig) -> None:
        """Add an adapter in its initial state."""
        self.configs[adapter_name] = config
        self.make_by(SlotTable(config.slots, self._matrix().shape[1]), adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def make_by(self, maker: nn.Module, adapter_name: str = "default") -> None:
        """Let a module make the vectors: it is called with the numbers 0 to n - 1, and returns (n, d)."""
        # In its own type: peft's way of moving it would give it the base's.
        self.prompt_slots[adapter_name] = maker.to(self._matrix().device)

    def vectors(self, adapter_name: str = "default") -> torch.Tensor:
        """Return P, (n, d), with a graph to what makes it."""
        n = self.configs[adapter_name].slots
        return self.prompt_slots[adapter_name](torch.arange(n, device=self._matrix().device))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return what the model reads, (batch, seq, d), for ids of (batch, seq)."""
        found = {name: ids - self.configs[name].first_token for name in self.prompt_slots}
        masks = {name: (slot >= 0) & (slot < self.configs[name].slots) for name, slot in found.items()}
        plain = ids
        for name, mask in masks.items():
            plain = plain.masked_fill(mask, self.configs[name].stand_in)
        read = self.base_layer(plain)
        for name in () if self.disable_adapters else self.active_adapters:
            if name in found:
                own = self.vectors(name).to(read.dtype)[found[name].clamp(0, self.configs[name].slots - 1)]
                read = torch.where(masks[name].unsqueeze(-1), own, read)
        return read

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: the vectors stand in rows that the base does not have.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("vectors of a prompt are input: no weight of the base can take them up")

    def _matrix(self) -> torch.Tensor:
        embedding: Any = self.get_base_layer()
        return embedding.weight

    def __repr__(self) -> str:
        return "prompt_slots." + super().__repr__()


class PromptSlotsModel(LayerTuner):
    """Puts the layer around the input embedding."""

    prefix = "prompt_slots"
    tuner_layer_cls = PromptSlotsLayer

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        """Return nothing: a head that is tied to the embedding's matrix stays tied, as no matrix changes."""
        return []


def slots_layer(model: nn.Module) -> PromptSlotsLayer:
    """Return the one layer of a model with such an adapter."""
    return next(_layers(model))


def keep_vectors(model: nn.Module) -> None:
    """Replace what made the vectors in training by a table of them, in place."""
    layer = slots_layer(model)
    values = layer.vectors().detach()
    trained: Any = layer.prompt_slots["default"]
    table = SlotTable(*values.shape).train(trained.training)
    table.weight.data = values.float()
    layer.make_by(table)


def _layers(model: nn.Module) -> Iterator[PromptSlotsLayer]:
    return (module for module in model.modules() if isinstance(module, PromptSlotsLayer))
