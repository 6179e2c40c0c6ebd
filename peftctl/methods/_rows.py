"""Methods that train chosen rows, or columns, of linear layers beside a frozen rest.

They are applied over as many rows as the main stage has, the first ones of each layer; which ones train is found out
later, and kept in checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftctl.errors import RunError, UsageError
from peftctl.methods import _groups, _heads, _targets, base
from peftctl.methods._lora import TASK_TYPES
from peftctl.recipe.schema import TrainSection

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Layer:
    """A layer some of whose rows train, or some of its columns.

    Args:
        module: Linear or Conv1D.
        columns: Whether it is columns.
        bias: Whether the rows' entries of the bias train too.
    """

    module: nn.Module
    columns: bool = False
    bias: bool = False

    @property
    def size(self) -> int:
        """How many rows, or columns, it has."""
        return _targets.in_out_features(self.module)[0 if self.columns else 1]

    @property
    def parameters(self) -> int:
        """How many parameters one of them has."""
        return _targets.in_out_features(self.module)[1 if self.columns else 0] + self.bias


class RowMethod(base.Method):
    """Base of these methods: `_layers` are the layers, `_counts` says how many rows of each train in the main stage."""

    def count(self, model: PreTrainedModel) -> int:
        """Return the parameters of the rows, plus a new head."""
        layers = self._layers(model)
        rows = sum(k * layers[name].parameters for name, k in self._counts(layers).items())
        return rows + _heads.head_parameters(model)

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Attach changes of the first rows of each layer."""
        from peft import get_peft_model

        from peftctl.tuners.float32_copy import widen_copies
        from peftctl.tuners.row_delta import RowDeltaConfig

        self.stages(context.recipe)  # refuses lengths that do not fit before weights load
        self._seed = context.recipe.train.seed
        layers = self._layers(model)
        self._sizes = {name: layer.size for name, layer in layers.items()}
        config = RowDeltaConfig(
            task_type=TASK_TYPES[context.recipe.model.task],
            counts=self._counts(layers),
            columns=[name for name, layer in layers.items() if layer.columns],
            biases=[name for name, layer in layers.items() if layer.bias],
            modules_to_save=_heads.unknown_to_peft(model) or None,
        )
        # Without weights peft would make the copy of a head on the CPU all the same.
        with model.device if model.device.type == "meta" else nullcontext():
            peft_model = get_peft_model(model, config)
        widen_copies(peft_model)
        return peft_model

    def param_groups(self, model: Any, train: TrainSection) -> list[dict[str, Any]]:
        """Return the rows, which decay to 0 and so to W, and vectors, which do not."""
        return _groups.by_decay((p for p in model.parameters() if p.requires_grad), train)

    def callbacks(self, model: Any) -> Sequence[base.Callback]:
        """Return what says how much a stage trains."""
        rows = sum(model.peft_config["default"].counts.values())
        return (_Report(rows, sum(p.numel() for p in model.parameters() if p.requires_grad)),)

    def state_dict(self, model: Any) -> dict[str, Any]:
        """Return which rows train."""
        from peftctl.tuners.row_delta import rows_of

        return {"rows": rows_of(model)}

    def load_state_dict(self, model: Any, state: Mapping[str, Any]) -> None:
        """Restore which rows train."""
        from peftctl.tuners.row_delta import place

        place(model, state["rows"])

    def export(self, model: Any) -> Any:
        """Return the adapter, with a head in the base's type: so peft loads it again."""
        from peftctl.tuners.float32_copy import narrow_copies

        narrow_copies(model)
        return model

    def _take_all(self, model: Any) -> None:
        """Let all rows of all layers train."""
        import torch

        from peftctl.tuners.row_delta import place

        place(model, {name: torch.arange(size) for name, size in self._sizes.items()})

    def _layers(self, model: PreTrainedModel) -> dict[str, Layer]:
        """Return the layers by name."""
        raise NotImplementedError

    def _counts(self, layers: Mapping[str, Layer]) -> dict[str, int]:
        """Return how many rows of each layer train in the main stage, where that is any."""
        raise NotImplementedError


class _Report(base.Callback):
    """Writes to metrics.jsonl how much a stage trains."""

    def __init__(self, rows: int, parameters: int):
        self.rows, self.parameters = rows, parameters

    def stage_begins(self, info: base.StepInfo) -> None:
        """Say it in the first line of the stage."""
        info.log |= {"rows": self.rows, "trainable_parameters": self.parameters}


def linear_layers(model: PreTrainedModel, targets: _targets.Targets, name: str) -> dict[str, nn.Module]:
    """Return the linear layers that targets select, by name, without a head, which trains whole.

    Raises:
        UsageError: An embedding is among them, or nothing is selected.
    """
    from torch import nn

    chosen = _targets.matched_modules(model, targets)
    for head in _heads.head_names(model):
        chosen = {other: m for other, m in chosen.items() if other != head and not other.startswith(f"{head}.")}
    for other, module in chosen.items():
        if isinstance(module, nn.Embedding):
            raise UsageError(f"method.target_modules: {other} is an embedding; {name} takes linear layers only")
    return chosen


def highest(scores: Mapping[str, torch.Tensor], k: int) -> dict[str, torch.Tensor]:
    """Return name -> ascending places of the entries that are among the k highest of all; of equals the first.

    Args:
        scores: Name -> (n,).
        k: At most as many as there are scores.

    Returns:
        Exactly k places in all; names without any are left out.

    Raises:
        RunError: A score is not a number.
    """
    import torch

    everything = torch.cat(list(scores.values()))
    if everything.isnan().any():
        raise RunError("a score of a row is not a number: training has diverged; lower train.learning_rate")
    chosen = torch.zeros(len(everything), dtype=torch.bool)
    chosen[everything.argsort(descending=True, stable=True)[:k].cpu()] = True
    parts = chosen.split([len(score) for score in scores.values()])
    return {name: part.nonzero()[:, 0] for name, part in zip(scores, parts, strict=True) if part.any()}
