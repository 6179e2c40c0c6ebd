"""What methods with fixed factors share (`tuners/fixed_factors.py`): their state, their result, and starts from W.

    y = W x + b + s B A dropout(x) + s F E x,   A: (r, d_in), B: (d_out, r) train; E: (q, d_in), F: (d_out, q) don't

W never changes, so the result is one ordinary LoRA adapter of rank r + q on the original base, [B F] and [A; E].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, ValidationInfo, field_validator

from peftctl.errors import RunError, UsageError
from peftctl.methods import _targets, base
from peftctl.methods._lora import LoraKeys, LoraMethod, refuse_embeddings
from peftctl.methods._selection import Selection
from peftctl.recipe.schema import Positive

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class FixedMethod(LoraMethod):
    """LoRA with fixed factors beside A and B."""

    def state_dict(self, model: Any) -> dict[str, Any]:
        """Return E and F of every layer."""
        from peftctl.tuners.fixed_factors import factors_state

        return {"factors": factors_state(model)}

    def load_state_dict(self, model: Any, state: Mapping[str, Any]) -> None:
        """Restore E and F of every layer."""
        from peftctl.tuners.fixed_factors import load_factors

        load_factors(model, state["factors"])

    def export(self, model: Any) -> Any:
        """Return one ordinary LoRA adapter, [B F] and [A; E], on the untouched base."""
        from peftctl.tuners.fixed_factors import into_one_adapter

        return into_one_adapter(super().export(model), self.last_rank())

    def last_rank(self) -> int | None:
        """Return how many rows of A, and columns of B, were trained at last; None is all."""
        return None

    def _select(self, model: PreTrainedModel) -> Selection:
        return refuse_embeddings(super()._select(model), self.config.name)


class StartKeys(LoraKeys):
    """Keys of methods whose A and B start from W."""

    r: Positive = 16
    """Rank of what trains; at most the smaller side of every target. The saved adapter has rank 2 r."""
    alpha: Annotated[float, Field(gt=0)] | None = Field(default=None, validate_default=True)  # type: ignore[assignment]
    """Scale: the update is multiplied by alpha / r; left out, alpha is r. The model starts as the base with any."""
    # W decides how A and B start, all of its rows take part, and dropout would drop a part of W, not of an update.
    dropout: ClassVar[float] = 0.0  # type: ignore[misc]
    init: ClassVar[str] = "kaiming"  # type: ignore[misc,assignment]
    parts: ClassVar[Sequence[str]] = ()  # type: ignore[misc,assignment]

    @field_validator("init_from")
    @classmethod
    def _starts_from_the_weights(cls, value: str | None) -> str | None:
        if value is not None:
            raise ValueError(
                "this method starts from the base's weights, and its result has twice the rank; name the finished "
                "adapter in model.adapters, which merges it first"
            )
        return value

    @field_validator("alpha")
    @classmethod
    def _scale_of_one(cls, value: float | None, info: ValidationInfo) -> float | None:
        return info.data.get("r") if value is None else value


class StartMethod(FixedMethod):
    """LoRA whose A and B start as a part of W that E = A_0 and F = -B_0 take away again."""

    config: StartKeys

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Attach A and B to the targets and let them start from W."""
        import torch

        from peftctl.tuners.fixed_factors import base_matrix, layers, start_from

        peft_model = super().apply(model, context)
        for name, layer in layers(peft_model):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            if model.device.type != "meta":  # there, only the shapes count
                w = base_matrix(layer)
                if not torch.isfinite(w).all():
                    raise RunError(f"the base's {name} holds NaN or infinity; fetch the model again")
                a, b = self.start(w, layer.r["default"], layer.scaling["default"], context.recipe.train.seed)
            start_from(layer, a, b)
        return peft_model

    def start(self, w: torch.Tensor, r: int, scale: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A_0: (r, d_in) and B_0: (d_out, r) of W: (d_out, d_in), for an update that is multiplied by scale."""
        raise NotImplementedError

    def _select(self, model: PreTrainedModel) -> Selection:
        selection = super()._select(model)
        for name, layer in selection.layers.items():
            d_in, d_out = _targets.in_out_features(layer.module)
            if layer.rank > min(d_in, d_out):
                raise UsageError(
                    f"method.r: expected at most {min(d_in, d_out)} for {name} of shape ({d_out}, {d_in}), got "
                    f"{layer.rank}; lower it, or give this target a rank of its own in method.rank_pattern"
                )
        return selection
