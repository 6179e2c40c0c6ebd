"""What the methods of the LoRA family share: the keys of their sections, the count, and how A and B are attached."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftctl.errors import UsageError
from peftctl.methods import _targets, base
from peftctl.methods._selection import Selection, select, tied_head
from peftctl.recipe.schema import Positive

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

TASK_TYPES = {
    "causal_lm": "CAUSAL_LM",
    "seq2seq_lm": "SEQ_2_SEQ_LM",
    "seq_cls": "SEQ_CLS",
    "token_cls": "TOKEN_CLS",
}
"""Our tasks by peft's names."""


class LoraKeys(base.AdapterConfig):
    """Keys that every method of the family reads."""

    r: Positive = 8
    """Rank of the update."""
    alpha: Annotated[float, Field(gt=0)] = 16
    """Scale: the update is multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input, in training only."""
    target_modules: str | list[str] | None = None
    """Name suffixes, a regular expression, or `all-linear`, `attention`, `mlp`; left out, peft's choice for the
    architecture."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """How A starts: Kaiming-uniform, U(-1/sqrt(d_in), 1/sqrt(d_in)), or Gaussian, N(0, 1/r^2)."""
    rank_pattern: dict[str, Positive] = Field(default_factory=dict)
    """Name pattern -> r of the targets it matches; the first that matches counts."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Name pattern -> alpha of the targets it matches."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Name suffixes of whole modules that train beside the adapter, e.g. `lm_head`; they are saved with it."""
    parts: list[str] = Field(default_factory=list)
    """Parts of a fused projection that train, e.g. `[q, v]` of a qkv; empty is all."""


class LoraMethod(base.Method):
    """Low-rank updates of linear layers."""

    config: LoraKeys
    peft_options: ClassVar[Mapping[str, Any]] = {}
    """Fields of peft's LoraConfig that this method sets on top."""

    def count(self, model: PreTrainedModel) -> int:
        """Return r * (d_in + d_out) over targets, plus whole modules, plus the rows of new tokens."""
        return self._select(model).count(len(self.new_token_ids))

    def notices(self, model: PreTrainedModel) -> list[str]:
        """Return what the targets and `modules_to_save` matched, where the recipe alone does not tell."""
        selection = self._select(model)
        lines = []
        if self.config.target_modules is None:
            lines.append(f"target_modules: {', '.join(_targets.suffixes(model, selection.layers))} (peft's choice)")
        if selection.whole:
            tie = f", with {selection.tied} tied to the embedding" if selection.tied else ""
            lines.append(f"trained whole: {', '.join(selection.whole)}{tie}")
        for name, layer in selection.layers.items():
            if layer.module is model.get_input_embeddings() and (head := tied_head(model)):
                lines.append(f"{name} and {head} share one matrix; the adapter changes the input only")
        return lines

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Attach A and B to the targets, and train whole modules and rows of new tokens beside them."""
        from peft import get_peft_model

        from peftctl.tuners.chosen_rows import keep_rows
        from peftctl.tuners.float32_copy import widen_copies

        selection = self._select(model)
        config = self._peft_config(model, selection, context)
        # Without weights there is nothing to draw or copy; peft would make its tensors on the CPU all the same.
        with model.device if model.device.type == "meta" else nullcontext(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*a tied layer is part of the adapter")  # `notices` says so
            saved = config.modules_to_save
            config.modules_to_save = saved and list(saved)
            peft_model = get_peft_model(model, config)
            config.modules_to_save = saved  # peft strikes a tied head off, but must read it to tie it when it loads
        widen_copies(peft_model)
        for name, layer in selection.layers.items():
            if layer.rows is not None:
                keep_rows(peft_model.get_base_model().get_submodule(name), layer.rows)
        return peft_model

    def export(self, model: Any) -> Any:
        """Return the adapter, with whole modules in the base's type: that is what peft turns them to when it loads."""
        from peftctl.tuners.float32_copy import narrow_copies

        narrow_copies(model)
        return model

    def _select(self, model: PreTrainedModel) -> Selection:
        return select(model, self.config, len(self.new_token_ids))

    def _peft_config(self, model: PreTrainedModel, selection: Selection, context: base.Context) -> LoraConfig:
        from peft import LoraConfig
        from transformers.pytorch_utils import Conv1D

        from peftctl.tuners.lora_linear import training_layers

        config = LoraConfig(
            task_type=TASK_TYPES[context.recipe.model.task],
            r=self.config.r,
            lora_alpha=self.config.alpha,  # type: ignore[arg-type]  # peft computes with any number
            lora_dropout=self.config.dropout,
            target_modules=_targets.suffixes(model, selection.layers),
            init_lora_weights="gaussian" if self.config.init == "gaussian" else True,
            rank_pattern=dict(self.config.rank_pattern),
            alpha_pattern=dict(self.config.alpha_pattern),
            modules_to_save=[*selection.whole, *([selection.tied] if selection.tied else [])] or None,
            trainable_token_indices={name: list(self.new_token_ids) for name in selection.token_rows} or None,
            ensure_weight_tying=selection.tied is not None,
            fan_in_fan_out=all(isinstance(layer.module, Conv1D) for layer in selection.layers.values()),
            **self.peft_options,
        )
        # For training; saved and reloaded as peft's own.
        config._register_custom_module(training_layers(model))
        return config


def refuse_embeddings(selection: Selection, method: str) -> Selection:
    """Return a selection without embeddings, for methods that give A and B different roles.

    Raises:
        UsageError: A target is an embedding, beside which A is the factor that starts at zero.
    """
    from torch import nn

    for name, layer in selection.layers.items():
        if isinstance(layer.module, nn.Embedding):
            raise UsageError(f"method.target_modules: {name} is an embedding; {method} takes linear layers only")
    return selection
