"""AdaMix: Mixture-of-Adaptations for Parameter-efficient Model Tuning, Wang et al. 2022 (https://arxiv.org/abs/2205.12410).

    in training       h + U_j φ(D_i h + b_i) + c_j,   (i, j) drawn uniformly for each adapter, one draw for all tokens
    otherwise         h + Ū φ(D̄ h + b̄) + c̄,          the means over the M experts: one plain adapter

behind the feed-forward part of every block, before dropout, residual and norm; D_i: (m, d), U_j: (d, m). By default all
D_i share one U. Every micro-batch passes twice, by independent routes, whose predictions p and q are held together:

    L = CE(p) + 1/2 [KL(p || q) + KL(q || p)],   each KL's target a constant

Both terms are means over supervised tokens, so that the loss of a step does not depend on how its rows are dealt to
micro-batches and processes; the authors divide the KL by rows, which is the same for classes of rows. metrics.jsonl has
the second term of `loss` as `consistency`. The passes are one over the rows twice: the time and memory of two.

Where we differ from the authors' code: routes are drawn once for an optimizer step, from (seed, step), not anew for
each micro-batch: all processes and micro-batches of a step, recomputed activations, and a resumed run have the same
ones without anything to remember. U starts at 0 and the model as the base; theirs are both drawn. Experts that no route
led to have gradients of 0 in the step, and go on with momentum and weight decay.

Not verified: that theirs are drawn from N(0, 0.02^2), as other new layers of their library are, and that the loss above
was meant for language models too; the released code has it for RoBERTa only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator

from peftctl.methods import _groups, base
from peftctl.methods._bottleneck import BottleneckKeys, BottleneckMethod, Chosen, behind
from peftctl.recipe.schema import Positive, TrainSection

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from peftctl.models.supervised import Supervised


class Config(BottleneckKeys):
    """The `method:` section of AdaMix."""

    name: Literal["adamix"] = "adamix"
    bottleneck: Positive = 16
    """m: width of the bottleneck."""
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    """φ."""
    experts: Positive = 4
    """M: experts of an adapter."""
    share_up: bool = True
    """One up-projection for all experts."""
    share_down: bool = False
    """One down-projection for all experts."""
    consistency: bool = True
    """Hold the predictions of two routes together, at twice the cost of a step."""
    target_modules: str | list[str] | None = None
    """Linear layers that an adapter follows: name suffixes, or a regular expression. Left out, the output projection
    of every feed-forward part."""

    @field_validator("init_from")
    @classmethod
    def _starts_anew(cls, value: str | None) -> str | None:
        if value is not None:
            raise ValueError("a finished adapter is the mean of its experts and has lost them; remove it")
        return value


class Method(BottleneckMethod):
    """Several experts in every adapter, one at a time, averaged in the end."""

    Config = Config
    config: Any
    card = base.Card(
        title="AdaMix",
        paper="Wang et al. 2022, arXiv 2205.12410",
        category="adapter",
        summary="Adapters of several experts, one of which is drawn for each step; saved as one, their average.",
        trains="D_i, U_j and biases of all experts; a classifier's head",
        count="L * (M_D * (dm + m) + M_U * (md + d)), M_D = M, M_U = 1 where shared, plus the head; "
        "the saved adapters have L * (2dm + m + d)",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        merge_note="the adapter is not linear, no weight of the base can take it up",
        supports=frozenset({"4bit", "8bit", "gradient_checkpointing", "resume"}),
    )

    def __init__(self, config: Any):
        super().__init__(config)
        self.seed = 0
        self.consistency = _Mean()

    @property
    def numbers(self) -> tuple[int, int]:
        """How many down-projections and how many up-projections an adapter has."""
        keys = self.config
        return 1 if keys.share_down else keys.experts, 1 if keys.share_up else keys.experts

    def chosen(self, model: PreTrainedModel) -> Chosen:
        """Return what the feed-forward parts end with, or the targets."""
        return behind(model, self.config.target_modules, "adamix", ("mlp",))

    def parameters(self, d: int) -> int:
        """Return M_D (dm + m) + M_U (md + d)."""
        m, (downs, ups) = self.config.bottleneck, self.numbers
        return downs * (d * m + m) + ups * (m * d + d)

    def settings(self, model: PreTrainedModel) -> Mapping[str, Any]:
        """Return the kind of adapter."""
        downs, ups = self.numbers
        return {"kind": "experts", "options": {"downs": downs, "ups": ups}}

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Attach the adapters, with the routes of the first step."""
        train = context.recipe.train
        self.seed, self.consistency = train.seed, _Mean(every=train.logging_steps)
        peft_model = super().apply(model, context)
        self.route(peft_model, 0)
        return peft_model

    def route(self, model: Any, step: int) -> None:
        """Set the routes of an optimizer step, counted from 0."""
        from peftctl.tuners.expert_adapters import experts_of, set_routes

        set_routes(model, routes(self.seed, step, len(experts_of(model)), self.numbers))

    def param_groups(self, model: Any, train: TrainSection) -> list[dict[str, Any]]:
        """Return projections, and a head's matrices, with weight decay, and vectors without: biases lie in matrices."""
        from peftctl.tuners.expert_adapters import experts_of

        found = [bias for module in experts_of(model) for bias in (module.down_bias, module.up_bias)]
        biases, rest = _groups.apart(model, found)
        return [{"params": biases, "weight_decay": 0.0}, *_groups.by_decay(rest, train)]

    def callbacks(self, model: Any) -> Sequence[base.Callback]:
        """Return what draws the routes."""
        return (_DrawRoutes(self),)

    def loss(
        self, model: Any, batch: Mapping[str, torch.Tensor], forward: Callable[..., Supervised]
    ) -> dict[str, torch.Tensor]:
        """Return the cross-entropies of the first pass plus what the second is apart from it, sums over tokens."""
        if not self.config.consistency:
            return super().loss(model, batch, forward)
        from dataclasses import replace

        import torch

        from peftctl.tuners.divergence import symmetric_divergence
        from peftctl.tuners.expert_adapters import two_passes

        two_passes(model)
        both = forward({name: torch.cat([value, value]) for name, value in batch.items()})
        n = len(both.labels) // 2
        apart = symmetric_divergence(both.logits[:n], both.logits[n:])
        self.consistency.add(apart.detach(), n)
        first = replace(both, logits=both.logits[:n], labels=both.labels[:n])
        return {"loss": first.cross_entropy() + apart}

    def export(self, model: Any) -> Any:
        """Return one plain adapter for each: the mean of its experts."""
        from peftctl.tuners.into_plain import into_plain

        return into_plain(super().export(model))


def routes(seed: int, step: int, adapters: int, numbers: tuple[int, int]) -> list[list[tuple[int, int]]]:
    """Return (i, j) of both passes of every adapter in an optimizer step; the same on every machine.

    Args:
        seed: Of the run.
        step: Counted from 0.
        adapters: How many there are.
        numbers: Of down-projections and of up-projections.
    """
    draw = random.Random(f"adamix {seed} {step}")
    downs, ups = numbers
    return [[(draw.randrange(downs), draw.randrange(ups)) for _ in range(2)] for _ in range(adapters)]


class _Mean:
    """A mean over tokens since the last line of metrics.jsonl, of the first process's.

    Args:
        every: Optimizer steps between two lines.
    """

    def __init__(self, every: int = 1):
        self.every = every
        self.total: Any = 0.0  # a device tensor, read only at log steps
        self.tokens = 0

    def add(self, total: torch.Tensor, tokens: int) -> None:
        """Add a micro-batch."""
        self.total, self.tokens = self.total + total, self.tokens + tokens

    def taken(self) -> float:
        """Return the mean, and begin anew."""
        mean = float(self.total) / max(self.tokens, 1)
        self.total, self.tokens = 0.0, 0
        return mean


class _DrawRoutes(base.Callback):
    """Sets new routes at every step, and gives the consistency to the line of metrics.jsonl that is due."""

    def __init__(self, method: Method):
        self.method = method

    def stage_begins(self, info: base.StepInfo) -> None:
        """Set the routes of the step at hand, also of a resumed run."""
        self.method.route(info.model, info.step)

    def after_step(self, info: base.StepInfo) -> None:
        """Set the routes of the next step."""
        self.method.route(info.model, info.step)
        mean = self.method.consistency
        if mean.tokens and (info.step in (1, info.total_steps) or info.step % mean.every == 0):
            info.log["consistency"] = mean.taken()
