"""What the methods of the LoRA family share: the keys of their sections, the count, and how A and B are attached."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from peftctl.methods import _targets, base
from peftctl.recipe.schema import Positive

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LoraKeys(base.AdapterConfig):
    """Keys that every method of the family reads."""

    r: Positive = 8
    """Rank of the update."""
    alpha: Annotated[float, Field(gt=0)] = 16
    """Scale: the update is multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input, in training only."""
    target_modules: str | list[str] | None = None
    """Name suffixes, a regular expression, or `all-linear`; left out, peft's choice for the architecture."""


class LoraMethod(base.Method):
    """Low-rank updates of linear layers."""

    def count(self, model: PreTrainedModel) -> int:
        """Return the sum over targets of r * (d_in + d_out)."""
        chosen = _targets.matched_modules(model, _targets.resolve_targets(model, self.config.target_modules))
        return sum(self.config.r * sum(_targets.in_out_features(module)) for module in chosen.values())

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Attach A and B to the targets."""
        from peft import LoraConfig, get_peft_model
        from torch import nn

        from peftctl.tuners.lora_linear import LoraLinear

        targets = _targets.resolve_targets(model, self.config.target_modules)
        _targets.matched_modules(model, targets)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.config.r,
            lora_alpha=self.config.alpha,
            lora_dropout=self.config.dropout,
            target_modules=targets,
        )
        config._register_custom_module({nn.Linear: LoraLinear})  # for training; saved and reloaded as peft's own
        return get_peft_model(model, config)
