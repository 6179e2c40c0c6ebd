"""LoRA-FA: LoRA with a frozen A, Zhang et al. 2023 (https://arxiv.org/abs/2308.03303).

    y = W x + b + s B A x,   s = alpha / r,   A: (r, d_in) random and frozen, B: (d_out, r) trained from zero

Only A x: (batch, seq, r) is kept for the backward pass, where LoRA keeps x: (batch, seq, d_in) of every target.
Dropout on x would keep a mask of x's size, so there is none.

    v1:  g_B = s G A^T,   G = dL/dW
    v2:  g_B <- g_B (A A^T)^-1 / s^2,   after which s g_B A = G P_A, P_A the projection onto the rows of A

v2 is the second version of the paper (2026): a step on B moves s B A by the full gradient projected onto what A can
reach. It is corrected inside of the backward pass, in float32 and with an inverse from float64 (peft's optimizer
multiplies in bfloat16), and any optimizer takes it; where r > d_in, a pseudo-inverse stands in. Clipping comes after.
With `variant: v1` nothing is corrected; where s = 1 and the rows of A are orthonormal, both versions are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator

from peftctl.methods import _targets, base
from peftctl.methods._lora import LoraKeys, LoraMethod, refuse_embeddings
from peftctl.methods.lora import Method as Lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftctl.methods._selection import Selection


class Config(LoraKeys):
    """The `method:` section of LoRA-FA."""

    name: Literal["lora_fa"] = "lora_fa"
    variant: Literal["v1", "v2"] = "v2"
    """Version of the paper: v2 corrects the gradient of B, v1 takes it as it is."""

    @field_validator("dropout")
    @classmethod
    def _keeps_no_input(cls, value: float) -> float:
        if value:
            raise ValueError(f"expected 0, got {value}: dropout keeps what lora_fa saves; remove it, or take lora")
        return value


class Method(LoraMethod):
    """LoRA whose A is random and stays so."""

    Config = Config
    config: Any
    card = base.Card(
        title="LoRA-FA",
        paper="Zhang et al. 2023, arXiv 2308.03303",
        category="lora",
        summary="LoRA with a random, frozen A: half the parameters train, and no input of a target is kept.",
        trains="B of every target",
        count="sum over targets of r * d_out, d_out of the trained parts; plus modules_to_save and new rows",
        tasks=Lora.card.tasks,
        mergeable=True,
        supports=Lora.card.supports,
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return r * d_out over targets, plus what trains beside them."""
        frozen = sum(
            layer.rank * _targets.in_out_features(layer.module)[0] for layer in self._select(model).layers.values()
        )
        return super().count(model) - frozen

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Attach A and B to the targets, freeze A, and correct the gradients of B in v2."""
        from peftctl.tuners.frozen_a import correct_gradients, freeze_a

        peft_model = super().apply(model, context)
        for _, layer in _layers(peft_model):
            freeze_a(layer)
            if self.config.variant == "v2":
                correct_gradients(layer)
        return peft_model

    def state_dict(self, model: Any) -> dict[str, Any]:
        """Return A of every target: `init_from` may have brought it."""
        return {name: layer.lora_A["default"].weight.cpu() for name, layer in _layers(model)}

    def load_state_dict(self, model: Any, state: Mapping[str, Any]) -> None:
        """Restore A of every target."""
        for name, layer in _layers(model):
            layer.lora_A["default"].weight.copy_(state[name])

    def _select(self, model: PreTrainedModel) -> Selection:
        return refuse_embeddings(super()._select(model), "lora_fa")


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))
