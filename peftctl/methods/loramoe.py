"""LoRAMoE: Dou et al., ACL 2024 (https://arxiv.org/abs/2312.09979).

    y = W x + (alpha / r) Σ_e w_e B_e A_e x,   w = softmax(R x)
    A_e: (r, d_in), B_e: (d_out, r), R: (E, d_in) without bias; in the feed-forward part, every target has its own

A and R start Kaiming-uniform, U(-1/sqrt(d_in), 1/sqrt(d_in)), and B at 0, so the model starts as the base exactly.
Localised balancing lets one half of the experts serve rows of type 0, and the other half rows of type 1:

    Q[e, n] = Σ over the tokens of row n of w_e,   Z = I * Q,   loss = balance * mean over targets of var(Z) / mean(Z)^2

over all entries of Z in a micro-batch, padding left out, with the unbiased variance. I[e, n] is 1 - delta where e is in
the half that serves rows of the type of n, else 1 + delta. Making Z even makes w go as 1/I: the half with 1 - delta
gets *more* weight. The paper says it the other way round: an importance of 1 + delta for the matching experts, which
takes weight from them. `favoured_half` names the half that does get more. Its default, `first` for rows of type 0, is
what the authors' code computes, where type 1 has 1 + delta in the first half.

var / (mean^2 + 1e-10) is the authors' code; the paper has var / mean, which is not free of scale. Not verified: the
paper's delta and balance (0.1 and 0.1 are our choice; the authors' script has the loss switched off), and whether
targets are summed or averaged. With several processes or accumulation every micro-batch is balanced on its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from peftctl.errors import UsageError
from peftctl.methods import _routed, base
from peftctl.recipe.schema import Positive

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Config(_routed.RoutedKeys):
    """The `method:` section of LoRAMoE."""

    name: Literal["loramoe"] = "loramoe"
    alpha: Annotated[float, Field(gt=0)] = 32
    """Scale: the sum of the experts is multiplied by alpha / r."""
    experts: Positive = 8
    """E, an even number."""
    target_modules: str | list[str] = "mlp"
    """Name suffixes, a regular expression, or `all-linear`, `attention`, `mlp`."""
    balance: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the localised balancing loss; 0 switches it off."""
    delta: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """How far the halves are pulled apart: the favoured one is drawn to (1 + delta) / (1 - delta) times the weight."""
    task_types: Annotated[list[Literal[0, 1]], Field(min_length=1)] = Field(default=[0])
    """Type of the rows of every one of `data.sources`; of a `data.train` alone a single one."""
    favoured_half: Literal["first", "second"] = "first"
    """Half of the experts that rows of type 0 come to use more; rows of type 1 use the other one more."""

    @field_validator("experts")
    @classmethod
    def _two_halves(cls, value: int) -> int:
        if value % 2:
            raise ValueError(f"expected an even number, as there are two halves, got {value}; take one more or less")
        return value


class Method(_routed.RoutedLoraMethod):
    """A dense mixture of LoRA experts whose halves specialise."""

    config: Config
    Config = Config
    card = base.Card(
        title="LoRAMoE",
        paper="Dou et al. 2024, arXiv 2312.09979",
        category="lora",
        summary="LoRA experts in the feed-forward parts under a dense router; a loss lets one half of them serve the "
        "rows of one type, and the other half those of the other.",
        trains="A and B of every expert, and the router, of every target; a classifier's head",
        count=_routed.COUNT,
        tasks=_routed.TASKS,
        merge_note=_routed.MERGE_NOTE,
        needs="Two kinds of rows as data.sources, each with its entry in task_types, for the halves to differ.",
        supports=_routed.SUPPORTS,
    )

    def notices(self, model: PreTrainedModel) -> list[str]:
        """Return that there is nothing to tell apart, where all rows are of one type."""
        if self.config.balance and len(set(self.config.task_types)) == 1:
            return [
                f"loramoe: all rows are of type {self.config.task_types[0]}, so one half of the experts is favoured "
                "throughout; give data.sources of both types and their task_types for halves that differ"
            ]
        return []

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Attach routers and experts.

        Raises:
            UsageError: `task_types` has not one entry for each of the sources.
        """
        sources = len(context.recipe.data.sources or [None])
        if len(self.config.task_types) != sources:
            where = "one for each of data.sources" if context.recipe.data.sources else "as data.train is one source"
            raise UsageError(
                f"method.task_types: expected {sources} entries of 0 or 1, {where}, got "
                f"{len(self.config.task_types)}; correct it"
            )
        return super().apply(model, context)

    def fields(self) -> Sequence[str]:
        """Return the source of each row."""
        return ("task_ids",)

    def routing_losses(
        self, routed: Sequence[_routed.Routed], batch: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return the localised balancing loss, where it is on."""
        if not self.config.balance:
            return {}
        types = batch["task_ids"].new_tensor(self.config.task_types)[batch["task_ids"].clamp(min=0)]
        losses = [localised_balance(layer, importance(self.config, types, layer)) for layer in routed]
        return {"balance": self.config.balance * sum(losses) / max(len(losses), 1)}  # type: ignore[dict-item]


def importance(config: Config, types: torch.Tensor, layer: _routed.Routed) -> torch.Tensor:
    """Return I, (batch, E): 1 - delta for the experts that serve the type of a row, else 1 + delta.

    Args:
        config: The section.
        types: (batch,), 0 or 1.
        layer: Says E and the type of the tensors.
    """
    experts = layer.probabilities.shape[-1]
    serving = (types == 0) == (config.favoured_half == "first")  # (batch,): whether the first half serves a row
    first = (types.new_ones(experts).cumsum(0) <= experts // 2)[None]
    sign = (serving[:, None] != first).to(layer.mask.device, layer.mask.dtype) * 2 - 1
    return 1 + config.delta * sign


def localised_balance(layer: _routed.Routed, importance: torch.Tensor) -> torch.Tensor:
    """Return the scalar var(Z) / (mean(Z)^2 + 1e-10) of one layer.

    Args:
        layer: Its routing.
        importance: I, (batch, E).
    """
    z = importance * (layer.mask[:, None] @ layer.probabilities)[:, 0]
    return z.var() / (z.mean() ** 2 + 1e-10)
