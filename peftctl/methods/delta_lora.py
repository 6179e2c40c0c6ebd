"""Delta-LoRA, Zi et al. 2023 (https://arxiv.org/abs/2309.02411).

LoRA, y = W_t x + b + s B A x, whose W follows the product without a gradient: after every optimizer step from K on,

    W_{t+1} = W_t + lambda s (B_{t+1} A_{t+1} - B_t A_t),   A: (r, d_in), B: (d_out, r), s = alpha / r

These changes telescope: after T steps W_T - W_K = lambda s (B_T A_T - B_K A_K). So W never has to be touched. We keep
the A_K and B_K of step K and compute

    y = W x + b + s (1 + lambda) B A x - lambda s B_K A_K x

where A and B get the gradients of s B A x alone: only that term has any in the method. This is the method exactly, with
accumulation too, because nothing happens between two optimizer steps; a base of a half type or of 4 bits loses nothing
by rounding, and switching the adapter off gives it back.

Mind what follows: the whole change, s (1 + lambda) B_T A_T - lambda s B_K A_K, has rank 2 r at most. The paper's claim
that W learns beyond a low rank does not hold literally. With K = 0, where B_K = 0, it is LoRA whose forward has the
scale (1 + lambda) s. The result is one ordinary LoRA of rank 2 r on the original base. The low-rank branch has no
dropout, as in the paper. Not verified: lambda = 2 and K = 500, which an independent implementation quotes, and what
the paper sets for each task. A run of K steps or fewer is LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import field_validator

from peftctl.methods import base
from peftctl.methods._fixed import FixedMethod
from peftctl.methods._lengths import Length, in_steps
from peftctl.methods._lora import LoraKeys
from peftctl.methods.lora import Method as Lora
from peftctl.recipe.schema import Rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Config(LoraKeys):
    """The `method:` section of Delta-LoRA."""

    name: Literal["delta_lora"] = "delta_lora"
    weight: Rate = 1.0
    """lambda: how far W follows a change of s B A. 0 is plain LoRA."""
    start: Length | None = None
    """K: steps, or fraction of the run, before W begins to follow; left out, the end of the recipe's warm-up."""
    # The paper removes it: the gradient would not be that of the product that W follows.
    dropout: ClassVar[float] = 0.0  # type: ignore[misc]

    @field_validator("init_from")
    @classmethod
    def _starts_anew(cls, value: str | None) -> str | None:
        if value is not None:
            raise ValueError(
                "a finished run of this method has rank 2 r, and this one begins with r; name it in model.adapters, "
                "which merges it first"
            )
        return value


class Method(FixedMethod):
    """LoRA whose base follows it."""

    Config = Config
    config: Any
    card = base.Card(
        title="Delta-LoRA",
        paper="Zi et al. 2023, arXiv 2309.02411",
        category="lora",
        summary="LoRA whose base follows each change of B A. The changes telescope: the whole update has rank 2r, "
        "no more.",
        trains="A and B of every target",
        count=Lora.card.count + ". What is saved has rank 2r",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        mergeable=True,
        needs="Memory for A and B as they were at step K: r * (d_in + d_out) float32 a target.",
        supports=Lora.card.supports,
    )

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Attach A and B."""
        train = context.recipe.train
        self._warmup = train.warmup_steps or train.warmup_ratio or 0
        return super().apply(model, context)

    def start_step(self, total_steps: int) -> int:
        """Return K, after how many optimizer steps of a run W begins to follow."""
        if self.config.start is not None:
            return in_steps(self.config.start, total_steps)
        # Rounded as the schedule's.
        return self._warmup if isinstance(self._warmup, int) else math.ceil(self._warmup * total_steps)

    def callbacks(self, model: Any) -> Sequence[base.Callback]:
        """Return what remembers A and B at step K."""
        return (_Start(self),) if self.config.weight else ()

    def load_state_dict(self, model: Any, state: Mapping[str, Any]) -> None:
        """Restore A and B of step K, in every layer."""
        from peftctl.tuners.fixed_factors import FollowedProduct, load_factors

        load_factors(model, state["factors"], partial(FollowedProduct, weight=self.config.weight))


class _Start(base.Callback):
    """Lets W follow from step K on."""

    def __init__(self, method: Method):
        self.method = method

    def stage_begins(self, info: base.StepInfo) -> None:
        """Start at once where K is 0."""
        self.after_step(info)

    def after_step(self, info: base.StepInfo) -> None:
        """Start after step K, where steps are left."""
        from peftctl.tuners.fixed_factors import follow, layers

        if info.step == self.method.start_step(info.total_steps) < info.total_steps:
            with info.whole():
                for _, layer in layers(info.model):
                    follow(layer, self.method.config.weight)
