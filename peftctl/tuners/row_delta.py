"""Some neurons of linear layers train as a tuner of peft: rows of W, or columns of it, with their bias entries.

    y = W x + b;   y[rows] += Δ x + β          Δ: (k, d_in), β: (k,), float32, 0 at first; k differs by layer
    y = W x + b + Δ^T x[columns]               Δ: (k, d_out), where the columns of a layer train

What lies outside has no parameter, so neither weight decay nor a moment of the optimizer can move it. W is never
changed: switched off, the layer is the base's. W gets no gradient either: a step costs one product of k rows more in
the forward pass, and the same in the backward pass, where full fine-tuning has a product of all rows. A layer of which
all rows train keeps no index.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from peftctl.models.anatomy import widths
from peftctl.tuners._layer_tuner import LayerTuner

TYPE = "PEFTCTL_ROW_DELTA"
"""What adapter_config.json calls this tuner."""


@dataclass
class RowDeltaConfig(PeftConfig):
    """Settings that are saved with the adapter.

    Args:
        counts: Full name of a layer -> k, how many of its rows or columns train. Other layers have no adapter.
        columns: Layers whose columns train, the weights of an input; of others it is rows.
        biases: Layers with rows whose entries of the bias train too.
        target_modules: The names in `counts`, as other tools look for them here.
        exclude_modules: Not used.
        modules_to_save: Modules that train whole beside the rows.
    """

    counts: dict[str, int] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TYPE
        self.target_modules = list(self.counts)


class RowDeltaLayer(nn.Module, BaseTunerLayer):
    """A Linear or a Conv1D of which k rows, or k columns, have changed.

    Args:
        base_layer: The layer.
        columns: Whether columns train, the weights of an input, rather than rows, those of an output.
    """

    adapter_layer_names = ("delta_weight", "delta_bias")
    other_param_names = ("delta_rows",)

    def __init__(self, base_layer: nn.Module, columns: bool = False):
        super().__init__()
        self.base_layer = base_layer
        self.columns = columns
        d_in, d_out = widths(base_layer)
        self.size, self.width = (d_in, d_out) if columns else (d_out, d_in)
        self.delta_weight = nn.ParameterDict()
        self.delta_bias = nn.ParameterDict()
        self.delta_rows = BufferDict({}, persistent=True)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._before_merge: list[list[tuple[torch.Tensor, torch.Tensor]]] = []

    def update_layer(self, adapter_name: str, count: int, bias: bool = False, inference_mode: bool = False) -> None:
        """Add an adapter over the first `count` rows, until `choose` or a state dict says which."""
        self._make(adapter_name, count, bias)
        if count < self.size:
            self.delta_rows[adapter_name] = torch.arange(count, dtype=torch.int32, device=self.weight.device)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def choose(self, adapter_name: str, rows: torch.Tensor) -> None:
        """Let these rows train: (k,), ascending. Rows that train already keep their values, others begin with 0."""
        rows = rows.to(self.weight.device, torch.int32)
        old = self.rows(adapter_name)
        if torch.equal(rows, old):
            return
        before = {"weight": self.delta_weight[adapter_name]}
        if adapter_name in self.delta_bias:
            before["bias"] = self.delta_bias[adapter_name]
        self._make(adapter_name, len(rows), "bias" in before)
        kept = torch.isin(rows, old)
        places = torch.searchsorted(old, rows[kept])
        with torch.no_grad():
            for part, values in before.items():
                new = getattr(self, f"delta_{part}")[adapter_name]
                new[kept] = values[places]
                new.requires_grad_(values.requires_grad)
        if len(rows) < self.size:
            self.delta_rows[adapter_name] = rows
        elif adapter_name in self.delta_rows:
            del self.delta_rows[adapter_name]

    def rows(self, adapter_name: str) -> torch.Tensor:
        """Return the rows that an adapter changes: (k,) int32, ascending."""
        if adapter_name in self.delta_rows:
            return self.delta_rows[adapter_name]
        return torch.arange(self.size, dtype=torch.int32, device=self.weight.device)

    def lines(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return a view of a matrix stored as W is, whose first dimension is that of the rows, or of the columns."""
        return matrix.T if self.columns != isinstance(self.get_base_layer(), Conv1D) else matrix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the layer with its changed rows makes of x, of shape (..., d_in)."""
        result = self.base_layer(x)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if name in self.delta_weight:
                result = self._add(result, x, name)
        return result

    def _add(self, result: torch.Tensor, x: torch.Tensor, name: str) -> torch.Tensor:
        weight = self.delta_weight[name].to(x.dtype)
        some = name in self.delta_rows
        if self.columns:
            picked = x.index_select(-1, self.delta_rows[name]) if some else x
            return result + (picked @ weight).to(result.dtype)
        bias = self.delta_bias[name].to(x.dtype) if name in self.delta_bias else None
        change = functional.linear(x, weight, bias).to(result.dtype)
        return result.index_add(-1, self.delta_rows[name], change) if some else result + change

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the changes to W and b in place.

        Raises:
            ValueError: W is quantised, or a changed row would not be finite, and `safe_merge` is set.
        """
        if not self.weight.is_floating_point():
            raise ValueError("rows can't be added to quantised weights; merge into the original ones")
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.delta_weight:
                continue
            rows = self.rows(name).long()
            changes = [(lines, lines[rows], self._changes(name, part)) for part, lines in self._parts(name).items()]
            for _, old, change in changes:
                if safe_merge and not torch.isfinite(old + change).all():
                    raise ValueError(f"the adapter {name} has values that are not finite")
            for lines, old, change in changes:
                lines[rows] = (old.to(torch.promote_types(old.dtype, change.dtype)) + change).to(old.dtype)
            self._before_merge.append([(lines, old) for lines, old, _ in changes])
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put back the rows that merging has changed, exactly."""
        while self.merged_adapters:
            rows = self.rows(self.merged_adapters.pop()).long()
            for lines, old in self._before_merge.pop():
                lines[rows] = old

    def _make(self, name: str, count: int, bias: bool) -> None:
        device = self.weight.device
        self.delta_weight[name] = nn.Parameter(torch.zeros(count, self.width, dtype=torch.float32, device=device))
        if bias:
            self.delta_bias[name] = nn.Parameter(torch.zeros(count, dtype=torch.float32, device=device))

    def _parts(self, name: str) -> dict[str, torch.Tensor]:
        """Return what an adapter changes: views of W and b whose first dimension is that of the rows."""
        return {"weight": self.lines(self.weight.detach())} | (
            {"bias": self.bias.detach()} if name in self.delta_bias else {}
        )

    def _changes(self, name: str, part: str) -> torch.Tensor:
        return getattr(self, f"delta_{part}")[name].detach()

    def __repr__(self) -> str:
        return "row_delta." + super().__repr__()


class RowDeltaModel(LayerTuner):
    """Puts a `RowDeltaLayer` around every layer of `counts`."""

    prefix = "delta_"
    tuner_layer_cls = RowDeltaLayer

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        return key in peft_config.counts

    def around(self, target: nn.Module, config: Any, key: str) -> RowDeltaLayer:
        """Return the layer around a target, without an adapter."""
        return RowDeltaLayer(target, key in config.columns)

    def settings(self, config: Any, key: str) -> Sequence[Any]:
        """Return how many rows of the layer change, whether its bias does, and whether they train."""
        return config.counts[key], key in config.biases, config.inference_mode


def layers(peft_model: Any) -> Iterator[tuple[str, RowDeltaLayer]]:
    """Yield the layers with their names in the base model."""
    for name, module in peft_model.get_base_model().named_modules():
        if isinstance(module, RowDeltaLayer):
            yield name, module


def rows_of(peft_model: Any) -> dict[str, torch.Tensor]:
    """Return name of a layer in the base model -> its rows that train, on the CPU."""
    return {name: layer.rows("default").cpu() for name, layer in layers(peft_model)}


def place(peft_model: Any, rows: Mapping[str, torch.Tensor]) -> None:
    """Choose the rows that train, in place; layers without any become the base's again.

    Args:
        peft_model: With one adapter of this type.
        rows: Name of a layer in the base model -> its rows, or columns, (k,), ascending. A layer that had none gets
            them here.
    """
    base, present = peft_model.get_base_model(), dict(layers(peft_model))
    config = peft_model.peft_config["default"]
    config.counts = {name: len(chosen) for name, chosen in rows.items()}
    for name in present.keys() | rows.keys():
        parent, _, leaf = name.rpartition(".")
        around, layer = base.get_submodule(parent), present.get(name)
        if name not in rows:
            assert layer is not None  # it is in one of the two
            setattr(around, leaf, layer.get_base_layer())
            continue
        if layer is None:
            peft_model.base_model._create_and_replace(config, "default", getattr(around, leaf), leaf, around, name)
            layer = getattr(around, leaf)
        layer.choose("default", rows[name])
    config.counts = {name: len(rows[name]) for name, _ in layers(peft_model)}
    config.target_modules = list(config.counts)


def begin_anew(peft_model: Any) -> None:
    """Put all that trains back to the base's values, in place: changes to 0, trained copies to what they replace."""
    with torch.no_grad():
        for _, layer in layers(peft_model):
            for values in (*layer.delta_weight.values(), *layer.delta_bias.values()):
                values.zero_()
        for module in peft_model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                own = module.original_module.parameters()
                for copied, original in zip(module.modules_to_save["default"].parameters(), own, strict=True):
                    copied.copy_(original)
