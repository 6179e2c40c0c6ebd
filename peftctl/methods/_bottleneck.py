"""What methods of bottleneck adapters share: the keys of their sections, the count, and how adapters are attached.

A method says where its adapters stand (`chosen`, as a rule one of `behind`, `beside` and `around`) and, where they are
no plain perceptrons, what they compute and how many parameters that has (`settings`, `parameters`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from peftctl.errors import UsageError
from peftctl.methods import _heads, _targets, base
from peftctl.methods._lora import TASK_TYPES
from peftctl.recipe.schema import Positive

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from peftctl.tuners.bottleneck import BottleneckConfig


class BottleneckKeys(base.AdapterConfig):
    """Keys that every method of bottleneck adapters reads."""

    bottleneck: Positive = 64
    """m: width of the bottleneck."""
    activation: Literal["gelu", "relu", "silu"] = "relu"
    """φ."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of D at first, before it is cut off at two of them."""


@dataclass(frozen=True)
class Chosen:
    """Where the adapters of a model stand.

    Args:
        placement: What `tuners/bottleneck.py` calls it.
        widths: Name of a target -> d of its adapter, in the model's order.
        reads: Name of a target -> the layer whose input its adapter reads, for `beside`.
        width: d where it can't be read off a target: for blocks.
    """

    placement: Literal["behind", "beside", "around"]
    widths: Mapping[str, int]
    reads: Mapping[str, str] = field(default_factory=dict)
    width: int | None = None


class BottleneckMethod(base.Method):
    """Small perceptrons beside, behind or around parts of a frozen model."""

    config: BottleneckKeys

    def chosen(self, model: PreTrainedModel) -> Chosen:
        """Return where adapters stand, of a model before `apply`."""
        raise NotImplementedError

    def parameters(self, d: int) -> int:
        """Return the parameters of one adapter of width d."""
        m = self.config.bottleneck
        return 2 * d * m + m + d

    def settings(self, model: PreTrainedModel) -> Mapping[str, Any]:
        """Return further fields of the tuner's configuration: `kind`, `options`, `scaling`, `up_std`."""
        return {}

    def tuner_config(self, **fields: Any) -> BottleneckConfig:
        """Return the tuner's configuration; overridden by methods whose tuner is a kind of `tuners/bottleneck.py`'s."""
        from peftctl.tuners.bottleneck import BottleneckConfig

        return BottleneckConfig(**fields)

    def whole(self, model: PreTrainedModel) -> Mapping[str, nn.Module]:
        """Return modules of the base that train whole beside the adapters, such as its norms; heads always do."""
        return {}

    def count(self, model: PreTrainedModel) -> int:
        """Return the parameters of all adapters, plus modules that train whole, plus a new head."""
        whole = sum(p.numel() for module in self.whole(model).values() for p in module.parameters())
        adapters = sum(self.parameters(d) for d in self.chosen(model).widths.values())
        return adapters + whole + _heads.head_parameters(model)

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Put an adapter at every chosen place, and copies of what trains whole beside them."""
        from peft import get_peft_model

        from peftctl.tuners.float32_copy import widen_copies

        chosen = self.chosen(model)
        fields: dict[str, Any] = {
            "task_type": TASK_TYPES[context.recipe.model.task],
            "bottleneck": self.config.bottleneck,
            "activation": self.config.activation,
            "init_std": self.config.init_std,
            "placement": chosen.placement,
            "reads": dict(chosen.reads),
            "width": chosen.width,
            "target_modules": _targets.suffixes(model, chosen.widths),
            "modules_to_save": [*_targets.suffixes(model, self.whole(model)), *_heads.unknown_to_peft(model)] or None,
        }
        config = self.tuner_config(**(fields | dict(self.settings(model))))
        # Without weights there is nothing to draw or copy; torch says so of every tensor.
        with model.device if model.device.type == "meta" else nullcontext(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            peft_model = get_peft_model(model, config)
        widen_copies(peft_model)
        return peft_model

    def export(self, model: Any) -> Any:
        """Return the adapter, with whole modules in the base's type: that is what peft turns them to when it loads."""
        from peftctl.tuners.float32_copy import narrow_copies

        narrow_copies(model)
        return model


def behind(
    model: PreTrainedModel,
    targets: _targets.Targets | None,
    method: str,
    parts: Sequence[Literal["attention", "mlp"]] = ("attention", "mlp"),
) -> Chosen:
    """Choose linear layers that an adapter follows.

    Args:
        model: Before `apply`.
        targets: Of `method.target_modules`; None takes the layers that the sublayers of all blocks end with.
        method: Its name, for errors.
        parts: Which sublayers, where no targets are given.

    Raises:
        UsageError: The targets select nothing or an embedding, or it is not known where the sublayers end.
    """
    from torch import nn

    from peftctl.models.anatomy import sublayer_ends

    if targets is None:
        linear = _targets.matched_modules(model, "all-linear")
        found = sublayer_ends(model, linear)
        ends = {name for part in parts for name in found[part]}
        modules = {name: module for name, module in linear.items() if name in ends}
    else:
        modules = _targets.matched_modules(model, targets)
    for name, module in modules.items():
        if isinstance(module, nn.Embedding):
            raise UsageError(f"method.target_modules: {name} is an embedding; {method} takes linear layers only")
    return Chosen("behind", {name: _targets.in_out_features(module)[1] for name, module in modules.items()})


def beside(model: PreTrainedModel) -> Chosen:
    """Choose the feed-forward parts of all blocks: an adapter reads what each of them reads.

    Raises:
        UsageError: It is not known where they end.
    """
    from peftctl.models.sublayers import feed_forwards

    linear = _targets.matched_modules(model, "all-linear")
    reads = feed_forwards(model, linear)
    return Chosen("beside", {name: _targets.in_out_features(linear[name])[1] for name in reads}, reads)


def around(model: PreTrainedModel) -> Chosen:
    """Choose the ends of all blocks: what returns the residual stream, or the LayerNorm of post-norm models.

    Raises:
        UsageError: It is not known of the architecture whether its blocks end with a norm.
    """
    from peftctl.models.sublayers import block_ends

    width: int = model.config.get_text_config().hidden_size
    ends = block_ends(model, _targets.matched_modules(model, "all-linear"))
    return Chosen("around", dict.fromkeys(ends, width), width=width)
