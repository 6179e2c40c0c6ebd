"""AdaLoRA: Adaptive Budget Allocation, Zhang et al. 2023 (https://arxiv.org/abs/2303.10512).

    y = W x + b + alpha / init_r * P diag(lambda) Q dropout(x),   P: (d_out, r), lambda: (r,), Q: (r, d_in), r = init_r

W and b stay frozen; P and Q are drawn from N(0, 0.02^2) and lambda is 0, so the model starts as the base. Triplets
(column of P, lambda, row of Q) that matter least have their lambda set to 0, and ranks go where they are of use:

    score of a parameter  s = I U,   I <- beta1 I + (1 - beta1) |w dL/dw|,   U <- beta2 U + (1 - beta2) ||w dL/dw| - I|
    score of triplet i    s(lambda_i) + mean s(P_:i) + mean s(Q_i:)
    triplets that stay    n init_r until step tinit, then n (target_r + (init_r - target_r) (1 - progress)^3) every
                          delta_t steps, and n target_r over the last tfinal steps; n targets, progress from 0 to 1

A triplet that lost its lambda can come back until the last phase. A second part of the loss, `orthogonality`, keeps P
and Q orthogonal. We follow peft and the authors' code where they differ from the paper: it is orth_reg_weight times
the mean over all P and Q of |P^T P - I| or |Q Q^T - I|, Frobenius norms that are not squared, and the scale is
alpha / init_r, fixed: pruning does not change it (peft adds 1e-5 to init_r). The scores see clipped gradients and the
weights after the step, as in the authors' code. What is saved has the base's precision: peft loads pruned factors so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from peftctl.errors import UsageError
from peftctl.methods import _targets, base
from peftctl.methods._lengths import Length, in_steps
from peftctl.methods._lora import TASK_TYPES
from peftctl.recipe.schema import OpenShare, Positive, Rate, Section

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from peftctl.models.supervised import Supervised

_SCORES = ("exp_avg_ipt", "exp_avg_unc")
"""peft's names of I and U: parameter -> tensor of its shape."""


class Budget(Section):
    """Keys of how ranks start, and of where they go."""

    init_r: Positive = 12
    """Rank of every target at first."""
    target_r: Annotated[Positive, Field(validate_default=True)] = 8
    """Mean rank of the targets at the end; below `init_r`."""
    tinit: Length = 0.1
    """Steps, or fraction of the run, before the first triplet is pruned."""
    tfinal: Length = 0.3
    """Steps, or fraction of the run, at its end during which ranks are settled."""
    delta_t: Length = 10
    """Steps, or fraction of the run, between two prunings."""
    beta1: OpenShare = 0.85
    """Smoothing of the sensitivity."""
    beta2: OpenShare = 0.85
    """Smoothing of its uncertainty."""
    orth_reg_weight: Rate = 0.1
    """Weight of the orthogonality part of the loss."""

    @field_validator("target_r")
    @classmethod
    def _prunes(cls, value: int, info: ValidationInfo) -> int:
        if value >= info.data.get("init_r", value + 1):
            raise ValueError(f"expected less than init_r, which is {info.data['init_r']}, got {value}")
        return value


class Config(Budget, base.AdapterConfig):
    """The `method:` section of AdaLoRA."""

    name: Literal["adalora"] = "adalora"
    alpha: Annotated[float, Field(gt=0)] = 16
    """Scale: the update is multiplied by alpha / init_r, also after pruning."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input, in training only."""
    target_modules: str | list[str] | None = None
    """Name suffixes, a regular expression, or `all-linear`, `attention`, `mlp`; left out, peft's choice for the
    architecture."""

    @field_validator("init_from")
    @classmethod
    def _starts_anew(cls, value: str | None) -> str | None:
        if value is not None:
            raise ValueError("a finished adalora is pruned and can't be pruned anew; merge it with model.adapters")
        return value


class Method(base.Method):
    """SVD-shaped updates of linear layers whose ranks are found while they train."""

    Config = Config
    loss_reads_weights = True
    card = base.Card(
        title="AdaLoRA",
        paper="Zhang et al. 2023, arXiv 2303.10512",
        category="lora",
        summary="Updates in SVD form; singular values that matter least are pruned, so that ranks differ by layer.",
        trains="P, lambda and Q of every target",
        count="sum over targets of init_r * (d_in + d_out + 1); what is saved is pruned to target_r on average",
        tasks=("causal_lm", "seq2seq_lm"),
        mergeable=True,
        supports=frozenset({"gradient_checkpointing", "resume"}),
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return the sum over targets of init_r * (d_in + d_out + 1)."""
        return sum(self.config.init_r * (sum(_targets.in_out_features(m)) + 1) for m in self._chosen(model).values())

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Attach P, lambda and Q to the targets."""
        from peft import AdaLoraConfig, get_peft_model
        from transformers.pytorch_utils import Conv1D

        chosen, keys = self._chosen(model), self.config
        if context.recipe.train.max_steps:
            phases(keys, context.recipe.train.max_steps)  # refuses lengths that do not fit before weights load
        config = AdaLoraConfig(
            task_type=TASK_TYPES[context.recipe.model.task],
            init_r=keys.init_r,
            target_r=keys.target_r,
            beta1=keys.beta1,
            beta2=keys.beta2,
            orth_reg_weight=keys.orth_reg_weight,
            total_step=1,  # known when the stage begins
            lora_alpha=keys.alpha,
            lora_dropout=keys.dropout,
            target_modules=_targets.suffixes(model, chosen),
            fan_in_fan_out=all(isinstance(module, Conv1D) for module in chosen.values()),
        )
        peft_model = get_peft_model(model, config)
        for layer in _layers(peft_model):
            # On bases of a half type peft lets this divisor of the scale train, and never saves it.
            layer.ranknum["default"].requires_grad_(False)
        # Not the model: the method outlives it. The allocator holds settings and scores only.
        self._allocator: Any = peft_model.base_model.rankallocator
        return peft_model

    def callbacks(self, model: Any) -> Sequence[base.Callback]:
        """Return the budget's schedule."""
        return (_Budget(self.config),)

    def loss(
        self, model: Any, batch: Mapping[str, torch.Tensor], forward: Callable[..., Supervised]
    ) -> dict[str, torch.Tensor]:
        """Return the cross-entropy and how far P and Q are from orthogonal."""
        parts = super().loss(model, batch, forward)
        if self.config.orth_reg_weight:
            parts["orthogonality"] = self.config.orth_reg_weight * orthogonality(model)
        return parts

    def state_dict(self, model: Any) -> dict[str, Any]:
        """Return the scores and the ranks that stand."""
        scores = {name: dict(getattr(self._allocator, name)) for name in _SCORES}
        return {**scores, "rank_pattern": self._allocator.peft_config.rank_pattern}

    def load_state_dict(self, model: Any, state: Mapping[str, Any]) -> None:
        """Restore scores and ranks."""
        for name in _SCORES:
            setattr(self._allocator, name, dict(state[name]))
        self._allocator.ipt = dict(self._allocator.exp_avg_ipt)  # its names only: every step makes its values anew
        self._allocator.peft_config.rank_pattern = state["rank_pattern"]

    def export(self, model: Any) -> Any:
        """Return the adapter with the ranks of the last pruning, in the base's precision."""
        pattern = self._allocator.peft_config.rank_pattern
        if pattern:
            self._allocator.mask_using_rank_pattern(model.base_model.model, pattern)
            # A target without any rank would be saved as empty tensors: it keeps one triplet, whose lambda is 0.
            kept = {name: [not any(ranks) or ranks[0], *ranks[1:]] for name, ranks in pattern.items()}
            self._allocator.peft_config.rank_pattern = kept
            # As peft loads it, to the last bit: on a bfloat16 base less than that can change many a rounding.
            model.base_model.resize_modules_by_rank_pattern(kept, "default")
            model.train(model.training)  # its new dropout is in training mode
            for layer in _layers(model):
                for tensors in (layer.lora_A, layer.lora_E, layer.lora_B, layer.ranknum):
                    tensors["default"].data = tensors["default"].data.float()
        return model

    def _chosen(self, model: PreTrainedModel) -> dict[str, Any]:
        from torch import nn

        chosen = _targets.matched_modules(model, _targets.resolve_targets(model, self.config.target_modules))
        for name, module in chosen.items():
            if isinstance(module, nn.Embedding):
                raise UsageError(f"method.target_modules: {name} is an embedding; adalora takes linear layers only")
        return chosen


class _Budget(base.Callback):
    """Scores every step and prunes to the budget of the schedule."""

    def __init__(self, config: Config):
        self.config = config

    def stage_begins(self, info: base.StepInfo) -> None:
        """Tell peft the lengths of the phases, now that the length of the run is known."""
        settings = info.model.base_model.rankallocator.peft_config
        settings.total_step = info.total_steps
        settings.tinit, settings.tfinal, settings.deltaT = phases(self.config, info.total_steps)

    def after_optimizer(self, info: base.StepInfo) -> None:
        """Score, and prune where the schedule says so."""
        tuner, step = info.model.base_model, info.step + 1
        allocator = tuner.rankallocator
        settling = step == info.total_steps - allocator.peft_config.tfinal
        with info.whole():
            if settling and not _scored(allocator):  # a run of one or two steps has no scores yet
                allocator.update_ipt(tuner.model)
            tuner.update_and_allocate(step)
        info.log["rank_budget"] = allocator.budget_schedule(step)[0]


def phases(config: Config, total: int) -> tuple[int, int, int]:
    """Return (tinit, tfinal, delta_t) in optimizer steps; fractions give way where a short run has no room for them.

    Args:
        config: The section.
        total: Optimizer steps of the run.

    Raises:
        UsageError: tinit and tfinal leave no step to prune in.
    """
    tinit, tfinal = in_steps(config.tinit, total), in_steps(config.tfinal, total)
    if isinstance(config.tfinal, float):
        tfinal = max(0, min(tfinal, total - 2))
    if isinstance(config.tinit, float):
        tinit = max(0, min(tinit, total - tfinal - 1))
    if tinit >= total - tfinal:
        raise UsageError(
            f"method.tinit: {tinit} steps before and method.tfinal: {tfinal} after the pruning leave none of {total}; "
            "shorten them, or give fractions"
        )
    return tinit, tfinal, max(1, in_steps(config.delta_t, total))


def orthogonality(model: Any) -> torch.Tensor:
    """Return the scalar mean over all P and Q of |P^T P - I| and |Q Q^T - I|, Frobenius."""
    import torch
    from torch.distributed.tensor import DTensor

    norms = []
    for layer in _layers(model):
        factors = layer.lora_A["default"], layer.lora_B["default"]
        q, p = (factor.full_tensor() if isinstance(factor, DTensor) else factor for factor in factors)  # FSDP's
        for gram in (q @ q.T, p.T @ p):
            norms.append(torch.linalg.norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)))
    return torch.stack(norms).mean()


def _layers(model: Any) -> Iterator[Any]:
    from peft.tuners.adalora import AdaLoraLayer

    return (layer for layer in model.modules() if isinstance(layer, AdaLoraLayer))


def _scored(allocator: Any) -> bool:
    return any(bool(score.any()) for score in allocator.exp_avg_ipt.values())
