"""PeriodicLoRA (PLoRA), Meng et al. 2024 (https://arxiv.org/abs/2402.16141).

At the end of every period but the last a share m of the update is unloaded: it joins what is frozen,

    W <- W + m s B A,   A <- sqrt(1 - m) A,   B <- sqrt(1 - m) B,   A: (r, d_in), B: (d_out, r), s = alpha / r

and the function stays as it was. With m = 1, A is drawn anew and B is zero instead. Either way the optimizer starts
empty, and the learning rate begins its schedule anew, warm-up included. The sum over N periods has rank up to N r.
With m = 0 nothing is ever unloaded: that is LoRA, bit for bit, with one schedule over the whole run.

The paper's momentum keeps a part of A and B when it unloads. Not verified: its formula, its share and its period. A
rule that is in use, A <- (1 - m) A and B <- (1 - m) B beside W + m s B A, changes the function, because the product
shrinks by (1 - m)^2; ours is the one that does not and treats A and B alike.

Unlike the paper we don't add to W: what is unloaded stays beside it as fixed factors, so a base of a half type or of 4
bits loses nothing by rounding, and the result is an ordinary LoRA on the original base.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from peftctl.methods import base
from peftctl.methods._lengths import in_steps
from peftctl.methods._restart import RestartKeys, RestartMethod
from peftctl.methods.lora import Method as Lora
from peftctl.recipe.schema import Share


class Config(RestartKeys):
    """The `method:` section of PeriodicLoRA."""

    name: Literal["periodic_lora"] = "periodic_lora"
    period: Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0.0, lt=1.0)] = 0.25
    """Optimizer steps, or fraction of the run, between two unloadings; the last period may be shorter."""
    unload_share: Share = 1.0
    """m, the share of B A that is unloaded. 1 draws A and B anew; less carries the rest over; 0 is plain LoRA."""


class Method(RestartMethod):
    """LoRA that unloads a share of itself from time to time."""

    Config = Config
    config: Any
    card = base.Card(
        title="PeriodicLoRA",
        paper="Meng et al. 2024, arXiv 2402.16141",
        category="lora",
        summary="LoRA that is unloaded in every period, and begins anew or from a share of itself.",
        trains="A and B of every target, once a period",
        count=Lora.card.count + ". What is saved has rank r times the number of periods",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        mergeable=True,
        needs="Memory and time for what is unloaded: every period adds r * (d_in + d_out) float32 a target.",
        supports=Lora.card.supports,
    )
    forgets_all = True

    def __init__(self, config: Any):
        super().__init__(config)
        self.keeps = 1 - config.unload_share

    def cycle(self, total_steps: int) -> int:
        """Return the steps of a period."""
        return max(1, in_steps(self.config.period, total_steps))

    def schedule_steps(self, total_steps: int) -> int:
        """Return the steps of a period: the schedule begins anew with each."""
        return self.cycle(total_steps) if self.config.unload_share else total_steps

    def callbacks(self, model: Any) -> Sequence[base.Callback]:
        """Return the unloadings."""
        return super().callbacks(model) if self.config.unload_share else ()
