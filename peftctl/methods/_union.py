"""What methods share whose adapter has several parts: prefixes, low-rank factors, bottleneck adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from peftctl.methods import _heads, _targets, base
from peftctl.methods._lora import TASK_TYPES
from peftctl.recipe.schema import Positive

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftctl.methods._bottleneck import Chosen
    from peftctl.methods._prefix import PrefixKeys
    from peftctl.models.attentions import Attention

MERGE_NOTE = "the prefix stands before the keys of the text, and the adapter is not linear: no weight can hold them"
IDENTITY_NOTE = "any prefix takes a share of the attention, keys of zero too"


class UnionKeys(base.MethodConfig):
    """Keys that every method with a prefix and a bottleneck adapter reads."""

    num_virtual_tokens: Positive = 30
    """Keys and values before those of the text in every attention layer."""
    projection: bool = False
    """Train a small network in every layer that makes its keys and values; only what it makes is saved."""
    hidden: Positive = 512
    """Width of that network."""
    prefix_std: Annotated[float, Field(gt=0)] = 1.0
    """Standard deviation of the prefix at the start; with `projection` of the table that the network reads."""
    bottleneck: Positive = 64
    """m: width of the bottleneck."""
    activation: Literal["gelu", "relu", "silu"] = "relu"
    """φ."""


@dataclass(frozen=True)
class Part:
    """A part of an adapter.

    Args:
        part: Its kind, as `tuners/union.py` calls it.
        targets: Names of the modules where it stands.
        settings: Of its kind.
        parameters: How many it has, all targets together and without gates.
        gates: Target -> width of its gate's input; where there are none it has no gate.
        gate: How its gates are made.
    """

    part: str
    targets: Sequence[str]
    settings: Mapping[str, Any]
    parameters: int
    gates: Mapping[str, int] = field(default_factory=dict)
    gate: Mapping[str, Any] | None = None

    @property
    def count(self) -> int:
        """Parameters with those of the gates, d + 1 each."""
        return self.parameters + sum(width + 1 for width in self.gates.values())


class UnionMethod(base.Method):
    """Several kinds of adapters in one."""

    config: UnionKeys

    def members(self, model: PreTrainedModel, task: str) -> list[Part]:
        """Return the parts of a model before `apply`."""
        raise NotImplementedError

    def count(self, model: PreTrainedModel) -> int:
        """Return the parameters of all parts, plus a new head."""
        parts = self.members(model, "causal_lm")  # no size depends on the task
        return sum(part.count for part in parts) + _heads.head_parameters(model)

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Put every part at its targets; the base is frozen."""
        task = context.recipe.model.task
        return attach(model, task, self.members(model, task))

    def export(self, model: Any) -> Any:
        """Return the adapter, with the prefix as a table, and heads in the base's type."""
        return finished(model)


def attach(model: PreTrainedModel, task: str, parts: Iterable[Part]) -> Any:
    """Put parts at their targets; the base is frozen, what trains is float32."""
    from peft import get_peft_model

    from peftctl.tuners.float32_copy import widen_copies
    from peftctl.tuners.union import UnionConfig

    saved = [
        {
            "part": part.part,
            "targets": _targets.suffixes(model, part.targets),
            "settings": dict(part.settings),
            "gate": None if part.gate is None else dict(part.gate),
        }
        for part in parts
    ]
    heads = _heads.unknown_to_peft(model) or None
    config = UnionConfig(task_type=TASK_TYPES[task], parts=saved, modules_to_save=heads)
    # Without weights there is nothing to draw or copy; torch says so of every tensor.
    with model.device if model.device.type == "meta" else nullcontext(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        peft_model = get_peft_model(model, config)
    widen_copies(peft_model)
    return peft_model


def finished(model: Any) -> Any:
    """Return what `attach` made, in place, with prefixes as tables, and heads in the base's type."""
    from peftctl.tuners.float32_copy import narrow_copies
    from peftctl.tuners.union import flatten_prefixes

    flatten_prefixes(model)
    narrow_copies(model)
    return model


def prefixes(
    found: Iterable[Attention],
    keys: UnionKeys | PrefixKeys,
    width: int,
    std: float,
    gate: Callable[[str], Mapping[str, Any]] | None = None,
) -> list[Part]:
    """Return a prefix for every attention layer: a part for those of one shape and one kind of gate.

    Args:
        found: The layers.
        keys: Of the method.
        width: d, of what the layers read.
        std: Of the table's normal distribution at first.
        gate: Name of a module -> how its gate is made; None gates nothing.
    """
    groups: dict[tuple[Any, ...], list[Attention]] = {}
    for layer in found:
        made = None if gate is None else tuple(sorted(gate(layer.name).items()))
        groups.setdefault((layer.heads, layer.key_dim, layer.value_dim, made), []).append(layer)
    hidden = keys.hidden if keys.projection else None
    parts = []
    for (heads, key_dim, value_dim, made), layers in groups.items():
        row, read, n = layers[0].row, heads * key_dim, keys.num_virtual_tokens
        size = n * row if hidden is None else n * read + (read + 1) * hidden + (hidden + 1) * row
        settings = {"tokens": n, "heads": heads, "key_dim": key_dim, "value_dim": value_dim, "width": width}
        names = [layer.name for layer in layers]
        gated = {} if made is None else {"gate": dict(made), "gates": dict.fromkeys(names, width)}
        settings |= {"hidden": hidden, "std": std}  # type: ignore[dict-item]
        parts.append(Part("prefix", names, settings, size * len(names), **gated))  # type: ignore[arg-type]
    return parts


def bottlenecks(
    chosen: Chosen,
    keys: UnionKeys,
    settings: Mapping[str, Any],
    gate: Callable[[str], Mapping[str, Any]] | None = None,
) -> list[Part]:
    """Return a bottleneck adapter for every chosen place: a part for those of one kind of gate.

    Args:
        chosen: Where they stand.
        keys: Of the method.
        settings: Further ones of the part: deviations, scaling.
        gate: As in `prefixes`.
    """
    groups: dict[Any, list[str]] = {}
    for name in chosen.widths:
        groups.setdefault(None if gate is None else tuple(sorted(gate(name).items())), []).append(name)
    m, parts = keys.bottleneck, []
    for made, names in groups.items():
        size = sum(2 * chosen.widths[name] * m + m + chosen.widths[name] for name in names)
        fields = {
            "bottleneck": m,
            "activation": keys.activation,
            "placement": chosen.placement,
            "reads": {name: chosen.reads[name] for name in names if name in chosen.reads},
            "width": chosen.width,
            **settings,
        }
        gated = {} if made is None else {"gate": dict(made), "gates": {n: chosen.widths[n] for n in names}}
        parts.append(Part("bottleneck", names, fields, size, **gated))  # type: ignore[arg-type]
    return parts
