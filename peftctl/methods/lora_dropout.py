"""LoRA-Dropout: LoRA Dropout as a Sparsity Regularizer, Lin et al. 2024 (https://arxiv.org/abs/2404.09610).

    y = W x + b + (alpha / r) (B m_out) (A m_in) x,   m_in: (d_in,), m_out: (d_out,), entries 0 or 1 / (1 - p)

In training every forward of a layer drops each column of A and each row of B with probability p: one mask for the
inputs and one for the outputs, the same for all tokens. The rank is never dropped, so the update keeps it, and an entry
of it is zero with probability 2p - p^2. Over AdaLoRA (`over: adalora`) the columns of Q and the rows of P are dropped;
lambda is not, and AdaLoRA's budget and orthogonality stay as they are.

What is saved is a plain LoRA or AdaLoRA adapter: the mean module. The paper's test-time ensemble, which averages over
masks, is made of it by `peftctl eval RUN --ensemble N`: the mean of the probabilities of N modules, each with masks
that it keeps. It costs N forward passes, and N = 4 is where to begin.

Not verified: whether the paper divides by 1 - p, as we do so that the mean of B m_out m_in A is B A; its p and N; and
whether it averages logits or probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from peftctl.methods import adalora as over_adalora
from peftctl.methods import base, lora
from peftctl.methods._lora import LoraKeys, LoraMethod, refuse_embeddings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from peftctl.methods._selection import Selection
    from peftctl.models.supervised import Supervised

_SHARED = frozenset({"name", "alpha", "dropout", "target_modules"})
_OF_LORA = frozenset(LoraKeys.model_fields) - _SHARED
"""Keys that have no meaning over AdaLoRA."""


class Config(LoraKeys):
    """The `method:` section of LoRA-Dropout."""

    name: Literal["lora_dropout"] = "lora_dropout"
    p: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of the columns of A, and of the rows of B, that every forward drops in training."""
    over: Literal["lora", "adalora"] = "lora"
    """The adapter whose factors are dropped."""
    adalora: over_adalora.Budget | None = None
    """Over AdaLoRA: its keys init_r, target_r, tinit, tfinal, delta_t, beta1, beta2 and orth_reg_weight; left out, its
    defaults. They stand in for `r` and the other keys of LoRA but `alpha`, `dropout` and `target_modules`."""

    @field_validator("adalora")
    @classmethod
    def _is_read(cls, value: over_adalora.Budget | None, info: ValidationInfo) -> over_adalora.Budget | None:
        if value is not None and info.data.get("over") == "lora":
            raise ValueError("expected nothing, since method.over is lora; remove it, or set method.over to adalora")
        return value

    @model_validator(mode="before")
    @classmethod
    def _ranks_are_found(cls, section: Any) -> Any:
        if isinstance(section, Mapping) and section.get("over") == "adalora":
            unread = sorted(_OF_LORA & section.keys())
            if unread:
                raise ValueError(
                    f"over adalora nothing reads {', '.join(unread)}; remove, and give init_r, target_r and the like "
                    "in method.adalora"
                )
        return section


class Method(base.Method):
    """LoRA or AdaLoRA whose factors lose random columns and rows at every training step."""

    Config = Config
    card = base.Card(
        title="LoRA-Dropout",
        paper="Lin et al. 2024, arXiv 2404.09610",
        category="lora",
        summary="LoRA or AdaLoRA that drops random columns of A and rows of B in training; an ensemble at test time.",
        trains="A and B of every target, or AdaLoRA's P, lambda and Q",
        count=lora.Method.card.count,
        tasks=lora.Method.card.tasks,
        mergeable=True,
        supports=lora.Method.card.supports,
    )

    def __init__(self, config: Any):
        super().__init__(config)
        if config.over == "lora":
            self.adapter: base.Method = _Lora(config)
            return
        shared = {key: getattr(config, key) for key in _SHARED - {"name"}}
        budget = (config.adalora or over_adalora.Budget()).model_dump()
        self.adapter = over_adalora.Method(over_adalora.Config(**shared, **budget))
        # What is claimed, read and kept whole depends on the adapter.
        under = over_adalora.Method.card
        self.card = replace(  # type: ignore[misc]
            self.card,
            title="LoRA-Dropout over AdaLoRA",
            trains=under.trains,
            count=under.count,
            tasks=under.tasks,
            supports=under.supports,
        )
        self.unread = frozenset(f"method.{key}" for key in _OF_LORA)  # type: ignore[misc]
        self.loss_reads_weights = over_adalora.Method.loss_reads_weights  # type: ignore[misc]

    def count(self, model: PreTrainedModel) -> int:
        """Return what the adapter counts: dropping adds no parameter."""
        return self._over().count(model)

    def notices(self, model: PreTrainedModel) -> Sequence[str]:
        """Return what the adapter has to say of its targets."""
        return self._over().notices(model)

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Attach the adapter, and let its layers drop columns and rows in training."""
        from peftctl.tuners.dropped_factors import drop_in_training

        peft_model = self._over().apply(model, context)
        drop_in_training(peft_model, self.config.p)
        return peft_model

    def callbacks(self, model: Any) -> Sequence[base.Callback]:
        """Return the adapter's schedules."""
        return self.adapter.callbacks(model)

    def loss(
        self, model: Any, batch: Mapping[str, torch.Tensor], forward: Callable[..., Supervised]
    ) -> dict[str, torch.Tensor]:
        """Return the adapter's loss: the penalty of AdaLoRA is on the whole P and Q."""
        return self.adapter.loss(model, batch, forward)

    def state_dict(self, model: Any) -> dict[str, Any]:
        """Return the adapter's state; masks have none."""
        return self.adapter.state_dict(model)

    def load_state_dict(self, model: Any, state: Mapping[str, Any]) -> None:
        """Restore the adapter's state."""
        self.adapter.load_state_dict(model, state)

    def export(self, model: Any) -> Any:
        """Return the mean module, a plain LoRA or AdaLoRA adapter."""
        return self.adapter.export(model)

    def _over(self) -> base.Method:
        """Return the adapter; it knows of new tokens."""
        self.adapter.new_token_ids = self.new_token_ids
        return self.adapter


class _Lora(LoraMethod):
    """LoRA beside linear layers: of an embedding's factors neither reads features that could be dropped."""

    def _select(self, model: PreTrainedModel) -> Selection:
        return refuse_embeddings(super()._select(model), "lora_dropout")
