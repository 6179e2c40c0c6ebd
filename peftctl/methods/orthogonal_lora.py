"""O-LoRA: orthogonal subspaces for continual learning, Wang et al. 2023 (https://arxiv.org/abs/2310.14152).

    y = W x + s sum_{i<t} B_i A_i x + s B_t A_t x,   A_i: (r, d_in), B_i: (d_out, r), s = alpha / r, one pair a task
    L = L_t + orth_weight * sum_targets |E A_t^T|_1 + norm_weight * sum_targets (|A_t|_2 + |B_t|_2)

Tasks come one after another, a source of `data.sources` each; E: ((t - 1) r, d_in) are the rows of all earlier A_i, and
|.|_1 is the sum of absolute values. When a task begins, the pair of the one before is frozen (`tuners/
fixed_factors.py`), A_t is drawn anew and B_t is zero: the function is as it was. The penalty pushes A_t, which decides
what of x the new pair reads, out of the space that earlier pairs read; it reaches A_t alone. Nothing of an earlier task
is kept but its pair, and the result is one ordinary LoRA of rank t r on the untouched base. One task is plain LoRA.

The paper writes the squares of the entries of A_i A_t^T; its authors' code adds up their absolute values, and so do we:
the penalty's pull does not fade as it nears zero. As theirs, ours is a sum over all entries of all targets, no mean, so
that the authors' weights mean here what they mean there. It grows with the targets and with r^2 and starts far above
the cross-entropy; with Adam that decides the direction in which A_t moves, not how far, and B_t feels it only where
`max_grad_norm` scales all gradients by one norm. It is the same in every micro-batch and process, and counts once.

A classifier's head, whole modules and rows of new tokens go on training through all tasks, and nothing keeps what they
were; the authors train A and B alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator

from peftctl.methods import base
from peftctl.methods._fixed import FixedMethod
from peftctl.methods._lora import LoraKeys
from peftctl.methods.lora import Method as Lora
from peftctl.recipe.schema import Rate, Recipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from peftctl.data.encode import EncodedRow
    from peftctl.models.supervised import Supervised


class Config(LoraKeys):
    """The `method:` section of O-LoRA."""

    name: Literal["orthogonal_lora"] = "orthogonal_lora"
    orth_weight: Rate = 0.5
    """Weight of the part `orthogonality` of the loss: the sum of |E A^T| over targets, from the second task on."""
    norm_weight: Rate = 0.0
    """Weight of the part `factor_norm` of the loss: the sum of the 2-norms of all A and B that train."""
    init: Literal["kaiming"] = "kaiming"
    """How A starts in every task: Kaiming-uniform, U(-1/sqrt(d_in), 1/sqrt(d_in))."""

    @field_validator("init_from")
    @classmethod
    def _starts_anew(cls, value: str | None) -> str | None:
        if value is not None:
            raise ValueError(
                "a finished run of this method has the rank of all its tasks, and this one begins with r; name it in "
                "model.adapters, which merges it first"
            )
        return value


class Method(FixedMethod):
    """LoRA, one pair a task, whose A are pushed apart."""

    Config = Config
    config: Any
    loss_reads_weights = True
    card = base.Card(
        title="O-LoRA",
        paper="Wang et al. 2023, arXiv 2310.14152",
        category="lora",
        summary="Learns tasks one after another, each by a pair that reads other directions than earlier ones.",
        trains="A and B of every target, once a task; earlier pairs are frozen",
        count=Lora.card.count + ". What is saved has rank r times the number of tasks",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        mergeable=True,
        needs="Several data.sources, a task each, in order; one is plain LoRA. Every finished task adds r * (d_in + "
        "d_out) frozen float32 a target.",
        supports=Lora.card.supports,
    )

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Attach the A and B of the first task."""
        self._seed = context.recipe.train.seed
        self._tasks = 0
        return super().apply(model, context)

    def stages(self, recipe: Recipe) -> Sequence[base.Stage]:
        """Return a stage a task, over the rows of its source."""
        sources = recipe.data.sources or ()
        if len(sources) < 2:
            return (base.Stage("task 1"),)
        return [base.Stage(f"task {i + 1}", rows=partial(rows_of, source=i)) for i in range(len(sources))]

    def enter(self, model: Any, stage: base.Stage, batches: base.Batches) -> None:
        """Freeze the pair of the task before, if there was one, and begin another."""
        import torch

        from peftctl.tuners.fixed_factors import layers, restart

        if self._tasks:
            # A generator of its own: neither dropout nor the device decides the next A.
            generator = torch.Generator().manual_seed(self._seed + self._tasks)
            for _, layer in layers(model):
                restart(layer, generator)
        self._tasks += 1

    def loss(
        self, model: Any, batch: Mapping[str, torch.Tensor], forward: Callable[..., Supervised]
    ) -> dict[str, torch.Tensor]:
        """Return the cross-entropy, how much A shares with earlier ones, and how large A and B are."""
        parts = super().loss(model, batch, forward)
        if self.config.orth_weight and self._tasks > 1:
            parts["orthogonality"] = self.config.orth_weight * overlap(model)
        if self.config.norm_weight:
            parts["factor_norm"] = self.config.norm_weight * factor_norm(model)
        return parts

    def state_dict(self, model: Any) -> dict[str, Any]:
        """Return the pairs of earlier tasks, and how many tasks have begun."""
        return {**super().state_dict(model), "tasks": self._tasks}

    def load_state_dict(self, model: Any, state: Mapping[str, Any]) -> None:
        """Restore the pairs of earlier tasks."""
        super().load_state_dict(model, state)
        self._tasks = state["tasks"]


def rows_of(rows: Sequence[EncodedRow], source: int) -> Sequence[EncodedRow]:
    """Return the rows of one source.

    Raises:
        DataError: No row is left.
    """
    from peftctl.data.problems import wrong

    chosen = [row for row in rows if row.source == source]
    if not chosen:
        raise wrong(f"data.sources.{source}", "expected rows to train on, but none is left", "remove it, or add rows")
    return chosen


def overlap(model: Any) -> torch.Tensor:
    """Return the scalar sum over targets of |E A^T|, with E of earlier tasks frozen; its gradient reaches A only."""
    from peftctl.tuners.fixed_factors import layers

    shared = [
        (layer.fixed_factors.E @ _whole(layer.lora_A["default"].weight).T).abs().sum() for _, layer in layers(model)
    ]
    return _added(shared)


def factor_norm(model: Any) -> torch.Tensor:
    """Return the scalar sum of the 2-norms of all A and B that train."""
    import torch

    from peftctl.tuners.fixed_factors import factor_parameters, layers

    return _added([torch.linalg.vector_norm(_whole(p)) for _, layer in layers(model) for p in factor_parameters(layer)])


def _added(values: list[torch.Tensor]) -> torch.Tensor:
    """Return the sum of scalars that may lie on several devices."""
    import torch

    return torch.stack([value.to(values[0].device) for value in values]).sum()


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # FSDP's
