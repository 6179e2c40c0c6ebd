"""AdapterDrop: On the Efficiency of Adapters in Transformers, Rücklé et al. 2021 (https://arxiv.org/abs/2010.11918).

    block l = 1 .. L:   y_l + U_l φ(D_l y_l + b1_l) + b2_l   for l > n,      y_l   for l <= n

The adapters of the n lowest blocks are left out: up to there the forward pass is the frozen base's, whose states other
tasks can share, and the backward pass ends at block n + 1. Adapters stand as Pfeiffer's (exact) or Houlsby's do.

    fixed    n is chosen beforehand: lower blocks never have an adapter
    robust   n ~ uniform over {0, .., max_drop}, drawn anew for every optimizer step; the adapters work for any n then,
             and evaluation and artefact take `eval_drop` (`drop` in the artefact's adapter_config.json)

The paper draws for every batch, here a batch is all micro-batches of all processes of a step: n follows from the seed
and the number of the step alone. What rests in a step has no gradient, and neither weight decay nor a moment moves it.
An encoder-decoder, which the paper has none of, counts the decoder's blocks after the encoder's: so the backward pass
ends at one place there too.

Not verified: that the paper draws from {0, .., L - 1}. Pruning of fused adapters is AdapterFusion's affair.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from peftctl.errors import UsageError
from peftctl.methods import _targets, base
from peftctl.methods._bottleneck import BottleneckKeys, BottleneckMethod, Chosen, around, behind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftctl.tuners.bottleneck import BottleneckConfig

_Blocks = Annotated[int, Field(ge=0)]


class Config(BottleneckKeys):
    """The `method:` section of AdapterDrop."""

    name: Literal["adapter_drop"] = "adapter_drop"
    placement: Literal["pfeiffer", "houlsby"] = "pfeiffer"
    """One adapter at the end of every block, or one behind each of its sublayers."""
    mode: Literal["robust", "fixed"] = "robust"
    """Draw how many blocks have no adapter, or fix it."""
    drop: _Blocks | None = None
    """For `fixed`, n: how many of the lowest blocks have no adapter. Left out, L / 2 - 1, rounded down."""
    max_drop: _Blocks | None = None
    """For `robust`: the largest n that is drawn. Left out, L - 1."""
    eval_drop: _Blocks = 0
    """For `robust`, n at evaluation and in the artefact."""
    target_modules: str | list[str] | None = None
    """For `houlsby`: linear layers that an adapter follows, as name suffixes or a regular expression. Left out, the
    output projection of every sublayer."""

    @model_validator(mode="after")
    def _keys_have_a_reader(self) -> Config:
        unread = {"drop": self.mode == "robust", "max_drop": self.mode == "fixed", "eval_drop": self.mode == "fixed"}
        for key, ignored in unread.items():
            if ignored and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key}: mode: {self.mode} does not read it; `drop` is fixed's, `max_drop` and `eval_drop` robust's"
                )
        if self.placement == "pfeiffer" and self.target_modules is not None:
            raise ValueError("target_modules: linear layers are for placement: houlsby; set that, or leave them out")
        return self


class Method(BottleneckMethod):
    """Adapters without those of the lowest blocks."""

    Config = Config
    config: Any
    leaves_out = True
    card = base.Card(
        title="AdapterDrop",
        paper="Rücklé et al. 2021, arXiv 2010.11918",
        category="adapter",
        summary="Bottleneck adapters without those of the lowest blocks: a fixed number, or another at every step.",
        trains="D, U and biases of the adapters, of the upper blocks or of all; a classifier's head",
        count="L * (2dm + m + d), or (L - n) * (2dm + m + d) where n is fixed; twice that as Houlsby's; plus the head",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        merge_note="the adapter is not linear, no weight of the base can take it up",
        supports=frozenset({"4bit", "8bit", "gradient_checkpointing", "resume"}),
    )

    def chosen(self, model: PreTrainedModel) -> Chosen:
        """Return where adapters stand: in all blocks, or in those above the fixed n."""
        every = self._every(model)
        if self.config.mode == "robust":
            return every
        depths, blocks = _depths(model, every)
        least = self._fixed(blocks)
        return replace(every, widths={name: d for name, d in every.widths.items() if depths[name] >= least})

    def notices(self, model: PreTrainedModel) -> Sequence[str]:
        """Return how many blocks have no adapter."""
        _, blocks = _depths(model, self._every(model))
        if self.config.mode == "fixed":
            return [f"the lowest {self._fixed(blocks)} of {blocks} blocks have no adapter"]
        return [
            f"each step leaves out the adapters of the lowest 0 to {self._most(blocks)} of {blocks} blocks, "
            f"evaluation those of {self.config.eval_drop}"
        ]

    def count(self, model: PreTrainedModel) -> int:
        """Return the parameters of all adapters that train, plus a new head."""
        self._check(model)
        return super().count(model)

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Put adapters at all places, or at those above the fixed n."""
        self._seed = context.recipe.train.seed
        self._blocks = self._check(model)
        return super().apply(model, context)

    def settings(self, model: PreTrainedModel) -> Mapping[str, Any]:
        """Return the depths of the targets and how many blocks rest, where that may change."""
        if self.config.mode == "fixed":
            return {}
        return {"depths": _depths(model, self._every(model))[0], "drop": self.config.eval_drop}

    def tuner_config(self, **fields: Any) -> BottleneckConfig:
        """Return the configuration of adapters that may rest, or of plain ones."""
        if self.config.mode == "fixed":
            return super().tuner_config(**fields)
        from peftctl.tuners.adapter_drop import AdapterDropConfig

        return AdapterDropConfig(**fields)

    def callbacks(self, model: Any) -> Sequence[base.Callback]:
        """Return the draws, where there are any, and what lets the backward pass end early."""
        if self.config.mode == "fixed":
            return (_EarlyEnd(),)
        return _EarlyEnd(), _Draws(self._seed, self._most(self._blocks))

    def _every(self, model: PreTrainedModel) -> Chosen:
        """Return where adapters would stand if no block were without."""
        if self.config.placement == "pfeiffer":
            return around(model)
        return behind(model, self.config.target_modules, "adapter_drop")

    def _fixed(self, blocks: int) -> int:
        return max(0, blocks // 2 - 1) if self.config.drop is None else self.config.drop

    def _most(self, blocks: int) -> int:
        return blocks - 1 if self.config.max_drop is None else self.config.max_drop

    def _check(self, model: PreTrainedModel) -> int:
        """Return how many blocks the model has.

        Raises:
            UsageError: No adapter is left to train, or more blocks are to have none than there are.
        """
        _, blocks = _depths(model, self._every(model))
        for key, value, limit in (
            ("drop", self._fixed(blocks), blocks - 1),
            ("max_drop", self._most(blocks), blocks - 1),
            ("eval_drop", self.config.eval_drop, blocks),
        ):
            if value > limit:
                raise UsageError(f"method.{key}: the model has {blocks} blocks, got {value}; give at most {limit}")
        return blocks


class _EarlyEnd(base.Callback):
    """Keeps embeddings out of the graph."""

    def stage_begins(self, info: base.StepInfo) -> None:
        """Take back that embeddings require a gradient: a help for an older kind of recomputing, not for ours."""
        info.model.disable_input_require_grads()


class _Draws(base.Callback):
    """Draws n for the step that follows."""

    def __init__(self, seed: int, most: int):
        self.seed = seed
        self.most = most

    def stage_begins(self, info: base.StepInfo) -> None:
        """Draw for the first step, or for the one where a run goes on."""
        self.draw(info)

    def after_step(self, info: base.StepInfo) -> None:
        """Draw for the next step."""
        self.draw(info)

    def draw(self, info: base.StepInfo) -> None:
        """Let the adapters of n blocks rest."""
        from peftctl.tuners.adapter_drop import drop_in_training

        # Seeded by a text, which Python hashes alike on every machine; torch's random state is not touched.
        drop_in_training(info.model, random.Random(f"{self.seed}/{info.step}").randrange(self.most + 1))


def _depths(model: PreTrainedModel, chosen: Chosen) -> tuple[dict[str, int], int]:
    """Return the depth of every target, and how many blocks there are."""
    from peftctl.models.sublayers import depths

    return depths(model, _targets.matched_modules(model, "all-linear"), chosen.widths)
