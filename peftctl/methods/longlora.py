"""LongLoRA: longer rows at little cost, Chen et al. 2023, ICLR 2024 (https://arxiv.org/abs/2309.12307).

    q, k, v, o:  y = W x + (alpha / r) B A x                        A, B train, as in LoRA
    embedding of the tokens and every norm: trained whole ("without these two the gap to full tuning stays")
    attention, in training: half of the heads causally inside of groups [0, G), [G, 2G), ... of tokens, the others
        inside of [0, G/2), [G/2, 3G/2), ...                        (S2-Attn, `tuners/shifted_attention.py`)
    positions: m -> m / f,   f = ceil(target length / original length)    (linear RoPE, `models/rope.py`)

Evaluation, generation and the result have full attention. The paper's rows are packed to the target length T, with
G = T / 4; ours may be shorter, so `group` is a share of `data.max_length`, not of what a batch is padded to, and a row
that fits into one group has full attention. The last group of a row may be short; no row has to be a multiple of G.

With an odd number of heads the shifted half has one more, as in the authors' slicing. They train every parameter with
"embed" or "norm" in its name, of an untied head nothing; here it is the token embedding, to which a tied head stays
tied, and the norms, by what they are. Their script takes f from the lengths; here the recipe says it.
Not verified: that the authors train with betas of 0.9 and 0.95; here they are AdamW's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from peftctl.errors import UsageError
from peftctl.methods import base
from peftctl.methods._lora import LoraKeys, LoraMethod
from peftctl.methods._selection import Selection, name_of, select

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Config(LoraKeys):
    """The `method:` section of LongLoRA."""

    name: Literal["longlora"] = "longlora"
    target_modules: str | list[str] | None = "attention"
    """Name suffixes, a regular expression, or `all-linear`, `attention`, `mlp`; the paper has q, k, v and o."""
    group: Annotated[int, Field(ge=2, multiple_of=2)] | Annotated[float, Field(gt=0, le=1)] = 0.25
    """Tokens that attend to each other in training: an even number, or a share of `data.max_length`, 1.0 being full
    attention."""
    rope_factor: Annotated[float, Field(ge=1)] = 1.0
    """Positions are divided by it: the target length over the model's own, rounded up."""


class Method(LoraMethod):
    """LoRA on the attention, embeddings and norms trained whole, attention in shifted groups, stretched positions."""

    Config = Config
    config: Any
    card = base.Card(
        title="LongLoRA",
        paper="Chen et al. 2023, arXiv 2309.12307",
        category="lora",
        summary="Trains long rows with attention in shifted groups and stretched positions; full attention afterwards.",
        trains="A and B of the attention's projections; the token embedding and all norms, whole",
        count="sum over targets of r * (d_in + d_out), plus V * d of the embedding, plus the norms' parameters",
        mergeable=True,
        identity_note="in evaluation and with rope_factor 1; in training, rows longer than a group see less",
        disable_note="with rope_factor above 1 the positions stay stretched; else it gives the base exactly",
        supports=frozenset({"gradient_checkpointing", "resume", "4bit", "8bit"}),
    )

    def notices(self, model: PreTrainedModel) -> list[str]:
        """Return what trains whole."""
        selection = self._select(model)
        tie = f", with {selection.tied} tied to it" if selection.tied else ""
        embedding = name_of(model, model.get_input_embeddings())
        return [f"trained whole: {embedding}{tie}, and {len(selection.whole) - 1} modules more, among them all norms"]

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Stretch the positions, attach the adapter, and change the attention.

        Raises:
            UsageError: The model has no rotary positions to stretch, attends otherwise than with sdpa, or knows fewer
                positions than `data.max_length` asks for.
        """
        from peftctl.tuners.shifted_attention import register

        _refuse_attention(model, context)
        self._stretch(model)
        longest = context.recipe.data.max_length
        _refuse_overlong(model, longest, self.config.rope_factor)
        peft_model = super().apply(model, context)
        model.set_attn_implementation(register(_tokens(self.config.group, longest)))
        return peft_model

    def export(self, model: Any) -> Any:
        """Return the adapter on a model with full attention."""
        model.get_base_model().set_attn_implementation("sdpa")
        return super().export(model)

    def config_changes(self, model: Any) -> Mapping[str, Any]:
        """Return the RoPE parameters, where they are not the base's."""
        if self.config.rope_factor == 1:
            return {}
        return {"rope_parameters": dict(model.config.get_text_config().rope_parameters)}

    def _stretch(self, model: PreTrainedModel) -> None:
        from peftctl.models.rope import set_rope, stretched

        factor = self.config.rope_factor
        if factor == 1:
            return
        parameters = stretched(model.config, factor)
        if parameters is None or not set_rope(model, parameters):
            raise UsageError(
                f"method.rope_factor: got {factor:g}, but this {model.config.model_type} model has no plain rotary "
                "positions that could be stretched; set it to 1"
            )

    def _select(self, model: PreTrainedModel) -> Selection:
        whole = [*_embedding_and_norms(model), *self.config.modules_to_save]
        return select(model, self.config.model_copy(update={"modules_to_save": whole}), len(self.new_token_ids))


def _embedding_and_norms(model: PreTrainedModel) -> list[str]:
    """Return the names of the token embedding and of every norm with parameters."""
    norms = [
        name
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and any(True for _ in module.parameters())
    ]
    return [name_of(model, model.get_input_embeddings()), *norms]


def _tokens(group: float, longest: int) -> int:
    """Return the tokens of a group, even."""
    return group if isinstance(group, int) else 2 * math.ceil(group * longest / 2)


def _refuse_attention(model: PreTrainedModel, context: base.Context) -> None:
    """Raise where the groups could not be put in the place of the model's attention.

    Raises:
        UsageError: It is not the library's sdpa, or looks back over a window of its own.
    """
    asked = context.recipe.model.attn_implementation
    if asked not in (None, "sdpa"):
        raise UsageError(
            f"model.attn_implementation: longlora trains with an attention of its own over sdpa, got {asked}; remove it"
        )
    config, kind = model.config.get_text_config(), model.config.model_type
    if config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        raise UsageError(f"method: longlora can't change how the {kind} architecture attends; take lora")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) or _window(config) is not None:
        raise UsageError(f"method: this {kind} model attends over a sliding window, not over the row; take lora")


def _window(config: Any) -> int | None:
    return getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None


def _refuse_overlong(model: PreTrainedModel, longest: int, factor: float) -> None:
    from peftctl.models.rope import reach

    known = reach(model.config)
    if known is not None and longest > known:
        wanted = math.ceil(longest * factor / known)
        raise UsageError(
            f"data.max_length: got {longest}, but the model knows {known} positions with method.rope_factor "
            f"{factor:g}; lower it, or set method.rope_factor={wanted}"
        )
