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

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from peftctl.methods import base
from peftctl.methods._fixed import FixedMethod
from peftctl.methods._lengths import Length, in_steps
from peftctl.methods._lora import LoraKeys
from peftctl.methods.lora import Method as Lora
from peftctl.recipe.schema import TrainSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Config(LoraKeys):
    """The `method:` section of ReLoRA."""

    name: Literal["relora"] = "relora"
    cycle: Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0.0, lt=1.0)] = 0.25
    """Optimizer steps, or fraction of the run, between two restarts; the last cycle may be shorter."""
    restart_warmup: Length = 0.05
    """Steps, or fraction of a cycle, over which the learning rate rises from 0 after a restart."""
    init: Literal["kaiming"] = "kaiming"
    """How A starts in every cycle: Kaiming-uniform, U(-1/sqrt(d_in), 1/sqrt(d_in))."""

    @field_validator("init_from")
    @classmethod
    def _starts_anew(cls, value: str | None) -> str | None:
        if value is not None:
            raise ValueError(
                "a finished relora has the rank of all its cycles, and this one begins with r; name it in "
                "model.adapters, which merges it first"
            )
        return value


class Method(FixedMethod):
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

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Attach the A and B of the first cycle."""
        self._seed = context.recipe.train.seed
        return super().apply(model, context)

    def param_groups(self, model: Any, train: TrainSection) -> list[dict[str, Any]]:
        """Return A and B apart from all else that trains, because a restart forgets their state; matrices decay."""
        from peftctl.tuners.fixed_factors import factor_parameters, layers

        factors = {id(p) for _, layer in layers(model) for p in factor_parameters(layer)}
        trainable = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {
                "params": [p for p in trainable if (id(p) in factors) == ours and (p.ndim > 1) == is_matrix],
                "weight_decay": train.weight_decay if is_matrix else 0.0,
            }
            for ours in (True, False)
            for is_matrix in (True, False)
        ]
        return [group for group in groups if group["params"]]

    def learning_rate_factor(self, step: int, total_steps: int) -> float:
        """Return the warm-up after a restart: (t mod cycle) / restart_warmup, at most 1; 1 in the first cycle."""
        cycle, warmup = cycle_steps(self.config, total_steps)
        return min(1.0, step % cycle / warmup) if warmup and step >= cycle else 1.0

    def callbacks(self, model: Any) -> Sequence[base.Callback]:
        """Return the restarts."""
        return (_Restarts(self.config, self._seed),)


class _Restarts(base.Callback):
    """Begins a new cycle where steps are left to train it."""

    def __init__(self, config: Config, seed: int):
        self.config = config
        self.seed = seed

    def after_step(self, info: base.StepInfo) -> None:
        """Freeze A and B, draw the next ones, and let the optimizer forget the old."""
        import torch

        from peftctl.tuners.fixed_factors import layers, restart

        cycle, _ = cycle_steps(self.config, info.total_steps)
        if info.step % cycle or info.step >= info.total_steps:
            return
        restarts = info.step // cycle
        # A generator of its own: neither dropout nor the device decides the next A.
        generator = torch.Generator().manual_seed(self.seed + restarts)
        with info.whole():
            info.forget([p for _, layer in layers(info.model) for p in restart(layer, generator)])
        info.log["restarts"] = restarts


def cycle_steps(config: Config, total: int) -> tuple[int, int]:
    """Return (cycle, restart_warmup) in optimizer steps; a cycle has one at least.

    Args:
        config: The section.
        total: Optimizer steps of the run.
    """
    cycle = max(1, in_steps(config.cycle, total))
    return cycle, in_steps(config.restart_warmup, cycle)
