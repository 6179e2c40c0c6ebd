"""The engine of methods that train one low-rank pair after another: ReLoRA, chains of LoRA, PeriodicLoRA.

    W_T = W_0 + s sum_i B_i A_i,   A_i: (r, d_in), B_i: (d_out, r), s = alpha / r, one pair a cycle

At the end of every cycle but the last the trained pair joins the fixed factors (`tuners/fixed_factors.py`): that leaves
the function as it was. The next pair begins (A drawn anew, B zero), and the optimizer forgets what it knew of them. W
never changes: a base of a half type or of 4 bits loses nothing by rounding, and the result is one ordinary LoRA on the
original base, whose rank is the sum of all cycles'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import field_validator

from peftctl.methods import _groups, base
from peftctl.methods._fixed import FixedMethod
from peftctl.methods._lora import LoraKeys
from peftctl.recipe.schema import TrainSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RestartKeys(LoraKeys):
    """Keys of methods that restart."""

    init: Literal["kaiming"] = "kaiming"
    """How A starts in every cycle: Kaiming-uniform, U(-1/sqrt(d_in), 1/sqrt(d_in))."""

    @field_validator("init_from")
    @classmethod
    def _starts_anew(cls, value: str | None) -> str | None:
        if value is not None:
            raise ValueError(
                "a finished run of this method has the rank of all its cycles, and this one begins with r; name it in "
                "model.adapters, which merges it first"
            )
        return value


class RestartMethod(FixedMethod):
    """LoRA that restarts, with the sum of all cycles as its update."""

    forgets_all: ClassVar[bool] = False
    """Whether a restart empties the optimizer, not only what it knew of A and B."""
    keeps: float = 0.0
    """Share of B A that a restart leaves in A and B; all the rest joins the fixed factors."""

    def cycle(self, total_steps: int) -> int:
        """Return the optimizer steps between two restarts of a run, at least one."""
        raise NotImplementedError

    def rank(self, restarts: int) -> int | None:
        """Return the rank of the pair that trains after so many restarts; None is r. It may fall, and never rises."""
        return None

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Attach the A and B of the first cycle."""
        self._seed = context.recipe.train.seed
        self._restarts = 0
        return super().apply(model, context)

    def param_groups(self, model: Any, train: TrainSection) -> list[dict[str, Any]]:
        """Return A and B apart from all else that trains, because a restart forgets their state."""
        from peftctl.tuners.fixed_factors import factor_parameters, layers

        pairs, others = _groups.apart(model, (p for _, layer in layers(model) for p in factor_parameters(layer)))
        return [*_groups.by_decay(pairs, train), *_groups.by_decay(others, train)]

    def callbacks(self, model: Any) -> Sequence[base.Callback]:
        """Return the restarts."""
        return (_Restarts(self),)

    def state_dict(self, model: Any) -> dict[str, Any]:
        """Return the pairs of earlier cycles, and how many there were."""
        return {**super().state_dict(model), "restarts": self._restarts}

    def load_state_dict(self, model: Any, state: Mapping[str, Any]) -> None:
        """Restore the pairs of earlier cycles."""
        super().load_state_dict(model, state)
        self._restarts = state["restarts"]

    def last_rank(self) -> int | None:
        """Return the rank of the last cycle's pair."""
        return self.rank(self._restarts)

    def restart(self, info: base.StepInfo) -> None:
        """Begin the next cycle."""
        import torch

        from peftctl.tuners.fixed_factors import layers, restart

        self._restarts += 1
        # A generator of its own: neither dropout nor the device decides the next A.
        generator = torch.Generator().manual_seed(self._seed + self._restarts)
        ranks = self.rank(self._restarts - 1), self.rank(self._restarts)
        with info.whole():
            pairs = [p for _, layer in layers(info.model) for p in restart(layer, generator, self.keeps, *ranks)]
            trained = (p for p in info.model.parameters() if p.requires_grad)
            info.forget(trained if self.forgets_all else pairs)
        info.log["restarts"] = self._restarts


class _Restarts(base.Callback):
    """Begins a new cycle where steps are left to train it."""

    def __init__(self, method: RestartMethod):
        self.method = method

    def after_step(self, info: base.StepInfo) -> None:
        """Restart at the end of a cycle."""
        if info.step % self.method.cycle(info.total_steps) == 0 and info.step < info.total_steps:
            self.method.restart(info)
