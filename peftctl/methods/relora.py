"""ReLoRA: high-rank training by restarts of LoRA, Lialin et al. 2024 (https://arxiv.org/abs/2307.05695).

    W_T = W_0 + s sum_i B_i A_i,   A_i: (r, d_in), B_i: (d_out, r), s = alpha / r, one pair a cycle

After every cycle but the last the trained pair is frozen, A is drawn anew, B is zero, the optimizer forgets both, and
the learning rate is warmed up again. The sum of N cycles has rank up to N r. The learning rate is "jagged": at step t

    lr(t) = learning_rate * shape(t) * min(1, (t mod cycle) / restart_warmup)   after the first cycle, else without min

where shape is the recipe's `scheduler` with its warm-up over the whole run, which goes on as if nothing had happened.
The authors' code holds shape(restart + restart_warmup) while the rate climbs; ours is shape(t), which differs by no
more than the schedule does over those steps. The first step of a warm-up has the rate 0, as in any.

Unlike the paper we don't add s B_i A_i into W: the pairs of earlier cycles stay beside it, so a base of a half type or
of 4 bits loses nothing by rounding, and the result is an ordinary LoRA of rank N r on the original base. The authors
prune 99.9 % of the optimizer's moments and keep its step count, which makes the next updates two to three times too
large; we drop the whole state of A and B. The full-rank warm start and the trained embeddings and norms of the paper
are for pre-training; in fine-tuning the rest stays frozen. Their code zeroes the first A beside a zero B, where nothing
learns until the first restart: not so here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from peftctl.methods import base
from peftctl.methods._lengths import Length, in_steps
from peftctl.methods._restart import RestartKeys, RestartMethod
from peftctl.methods.lora import Method as Lora


class Config(RestartKeys):
    """The `method:` section of ReLoRA."""

    name: Literal["relora"] = "relora"
    cycle: Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0.0, lt=1.0)] = 0.25
    """Optimizer steps, or fraction of the run, between two restarts; the last cycle may be shorter."""
    restart_warmup: Length = 0.05
    """Steps, or fraction of a cycle, over which the learning rate rises from 0 after a restart."""


class Method(RestartMethod):
    """LoRA that restarts, with the sum of all cycles as its update."""

    Config = Config
    config: Any
    card = base.Card(
        title="ReLoRA",
        paper="Lialin et al. 2024, arXiv 2307.05695",
        category="lora",
        summary="LoRA that starts anew several times and keeps what it learned: the sum of all cycles has a high rank.",
        trains="A and B of every target, once a cycle",
        count=Lora.card.count + ". What is saved has rank r times the number of cycles",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        mergeable=True,
        needs="Memory and time for the frozen pairs: every finished cycle adds r * (d_in + d_out) float32 a target.",
        supports=Lora.card.supports,
    )

    def cycle(self, total_steps: int) -> int:
        """Return the steps of a cycle."""
        return cycle_steps(self.config, total_steps)[0]

    def learning_rate_factor(self, step: int, total_steps: int) -> float:
        """Return the warm-up after a restart: (t mod cycle) / restart_warmup, at most 1; 1 in the first cycle."""
        cycle, warmup = cycle_steps(self.config, total_steps)
        return min(1.0, step % cycle / warmup) if warmup and step >= cycle else 1.0


def cycle_steps(config: Config, total: int) -> tuple[int, int]:
    """Return (cycle, restart_warmup) in optimizer steps; a cycle has one at least.

    Args:
        config: The section.
        total: Optimizer steps of the run.
    """
    cycle = max(1, in_steps(config.cycle, total))
    return cycle, in_steps(config.restart_warmup, cycle)
