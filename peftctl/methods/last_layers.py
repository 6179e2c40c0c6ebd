"""Partial fine-tuning: the last k blocks train, all else is frozen. A classical baseline.

The lower blocks run without a graph, so the backward pass stops at block L - k. A trained copy stands beside each
frozen block (peft's modules_to_save), so the base stays recoverable and only these blocks are saved. The copies are
float32 and run under autocast in the recipe's dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from peftctl.errors import UsageError
from peftctl.methods import base
from peftctl.recipe.schema import Positive

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Config(base.MethodConfig):
    """The `method:` section of partial fine-tuning."""

    name: Literal["last_layers"] = "last_layers"
    layers: Positive = 2
    """k: how many blocks train, counted from the last."""


class Method(base.Method):
    """The last k transformer blocks."""

    Config = Config
    autocast = True
    card = base.Card(
        title="Last layers",
        paper="classical partial fine-tuning; compared with in Houlsby et al. 2019, arXiv 1902.00751",
        category="baseline",
        summary="The last k blocks train; the backward pass stops below them.",
        trains="every parameter of the last k blocks",
        count="k * parameters of a block",
        mergeable=True,
        supports=frozenset({"gradient_checkpointing", "resume"}),
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return the parameters of the last k blocks."""
        blocks = dict(model.named_modules())
        return sum(p.numel() for name in self._chosen(model) for p in blocks[name].parameters())

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Copy the last k blocks to float32 and let the copies train."""
        from peft import LoraConfig, get_peft_model
        from peft.utils.constants import DUMMY_TARGET_MODULES

        names = self._chosen(model)
        config = LoraConfig(task_type="CAUSAL_LM", r=1, target_modules=DUMMY_TARGET_MODULES, modules_to_save=names)
        peft_model = get_peft_model(model, config)
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return peft_model

    def _chosen(self, model: PreTrainedModel) -> list[str]:
        from peftctl.models.anatomy import block_list

        path, blocks = block_list(model)
        if self.config.layers > len(blocks):
            raise UsageError(f"method.layers: the model has {len(blocks)} blocks, got {self.config.layers}")
        return [f"{path}.{i}" for i in range(len(blocks) - self.config.layers, len(blocks))]
