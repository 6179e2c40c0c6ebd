"""DoRA: Weight-Decomposed Low-Rank Adaptation, Liu et al. 2024 (https://arxiv.org/abs/2402.09353).

    y = m * (V x) / |V| + b,   V = W + (alpha / r) B A,   A: (r, d_in), B: (d_out, r), m: (d_out,)

W and b stay frozen; m, A and B train, from m = |W| and B = 0. |V| holds the norm of every row of V and counts as a
constant in the backward pass, as in the paper's section 4.3. The paper writes columns of W: (d_in, d_out); its code and
peft take rows of W: (d_out, d_in), which are the same. Dropout reaches A only, as in the paper's equation; peft also
drops entries of x in the part of W x that m adds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import field_validator

from peftctl.errors import UsageError
from peftctl.methods import _targets, base
from peftctl.methods._lora import LoraKeys, LoraMethod, refuse_embeddings
from peftctl.methods.lora import Method as Lora

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

    from peftctl.methods._selection import Selection


class Config(LoraKeys):
    """The `method:` section of DoRA."""

    name: Literal["dora"] = "dora"

    @field_validator("parts")
    @classmethod
    def _whole_rows(cls, value: list[str]) -> list[str]:
        if value:
            raise ValueError("m would change the other parts as well; remove it, or take lora")
        return value


class Method(LoraMethod):
    """Magnitudes and directions of rows, the directions by LoRA."""

    Config = Config
    peft_options: ClassVar[Mapping[str, Any]] = {"use_dora": True}
    card = base.Card(
        title="DoRA",
        paper="Liu et al. 2024, arXiv 2402.09353",
        category="lora",
        summary="Splits every row of W into length and direction: LoRA turns the rows, m stretches them.",
        trains="A, B and m of every target",
        count="sum over targets of r * (d_in + d_out) + d_out; plus modules_to_save and new rows",
        tasks=Lora.card.tasks,
        mergeable=True,
        # peft loses the scales of 8-bit weights on a CPU when it dequantises them for their norms.
        supports=Lora.card.supports - {"8bit"},
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return LoRA's count plus d_out of every target."""
        layers = self._select(model).layers.values()
        return super().count(model) + sum(_targets.in_out_features(layer.module)[1] for layer in layers)

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Attach A, B and m to the targets."""
        from peftctl.tuners.dora_linear import adapted, set_magnitudes

        peft_model = super().apply(model, context)
        if model.device.type != "meta":
            for layer in adapted(peft_model):
                set_magnitudes(layer)
        return peft_model

    def _select(self, model: PreTrainedModel) -> Selection:
        from transformers.pytorch_utils import Conv1D

        selection = refuse_embeddings(super()._select(model), "dora")
        kinds = {isinstance(layer.module, Conv1D) for layer in selection.layers.values()}
        if len(kinds) > 1:
            raise UsageError("method.target_modules: dora can't mix Conv1D and Linear; leave out the output head")
        return selection

    def _peft_config(self, model: PreTrainedModel, selection: Selection, context: base.Context) -> LoraConfig:
        from peftctl.tuners.dora_linear import dora_layers

        config = super()._peft_config(model, selection, context)
        config._register_custom_module(dora_layers(model))
        return config
