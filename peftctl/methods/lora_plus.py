"""LoRA+: a larger learning rate for B, Hayou, Ghosh and Yu 2024 (https://arxiv.org/abs/2402.12354).

    y = W x + b + (alpha / r) B A dropout(x),   learning rate of A: eta,   of B: lambda * eta

The model is LoRA's. In wide models A and B that learn at one rate leave B too slow to move the features; lambda = 16
is the paper's rule of thumb. Schedules multiply both rates and so keep their ratio. All that trains beside the factors,
as `modules_to_save` and the rows of new tokens, learns at eta; peft's own LoRA+ gives every vector B's rate and drops
the weight decay. Beside an embedding A is the factor that starts at zero and reads no activations: the argument for a
ratio does not hold there, and embeddings are refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from peftctl.methods import _groups, base
from peftctl.methods._lora import LoraKeys, LoraMethod, refuse_embeddings
from peftctl.methods.lora import Method as Lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftctl.methods._selection import Selection
    from peftctl.recipe.schema import TrainSection


class Config(LoraKeys):
    """The `method:` section of LoRA+."""

    name: Literal["lora_plus"] = "lora_plus"
    ratio: Annotated[float, Field(gt=0)] = 16
    """lambda: B learns at ratio * train.learning_rate, all else at train.learning_rate."""


class Method(LoraMethod):
    """LoRA whose B learns faster than its A."""

    Config = Config
    config: Any
    card = base.Card(
        title="LoRA+",
        paper="Hayou, Ghosh and Yu 2024, arXiv 2402.12354",
        category="lora",
        summary="LoRA whose B learns 16 times faster than A: a better use of the same parameters in wide models.",
        trains="A and B of every target",
        count=Lora.card.count,
        tasks=Lora.card.tasks,
        mergeable=True,
        supports=Lora.card.supports,
    )

    def param_groups(self, model: Any, train: TrainSection) -> list[dict[str, Any]]:
        """Return B at ratio times the recipe's rate and all else at the rate; only matrices decay, as everywhere."""
        from peft.tuners.lora import LoraLayer

        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        fast, slow = _groups.apart(model, (p for layer in layers for p in layer.lora_B.parameters()))
        rate = train.learning_rate
        return [*_groups.by_decay(slow, train, lr=rate), *_groups.by_decay(fast, train, lr=self.config.ratio * rate)]

    def _select(self, model: PreTrainedModel) -> Selection:
        return refuse_embeddings(super()._select(model), "lora_plus")
