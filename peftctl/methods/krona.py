"""KronA: Kronecker adapter, Edalati et al. 2022 (https://arxiv.org/abs/2212.10650).

    y = W x + b + s (A kron B) x,   A: (a1, a2), B: (b1, b2), a1 b1 = d_out, a2 b2 = d_in

W and b stay frozen; A and B train. A is zero at first and B is drawn Kaiming-uniform, U(-1/sqrt(b2), 1/sqrt(b2)), so
the model starts as the base; the paper sets one factor to zero. rank(A kron B) = rank A * rank B, so the update can
have full rank. a1 is `factor` where that divides d_out, else the divisor of d_out below it that makes A and B most
alike; a2 of d_in likewise. The result is an adapter of peft's LoKr whose factors are whole. The paper's variants beside
the feed-forward part, KronA_B and KronA_B^res with a learned scale of the residual, are not built.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from peftctl.errors import UsageError
from peftctl.methods import _heads, _targets, base
from peftctl.methods._lora import TASK_TYPES
from peftctl.recipe.schema import Positive

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

Shape = tuple[int, int]


class Config(base.AdapterConfig):
    """The `method:` section of KronA."""

    name: Literal["krona"] = "krona"
    factor: Positive = 16
    """Rows and columns of A, as near as the sides of each target allow."""
    scale: Annotated[float, Field(gt=0)] = 1.0
    """s: the update is multiplied by it."""
    target_modules: str | list[str] | None = None
    """Name suffixes, a regular expression, or `all-linear`, `attention`, `mlp`; left out, peft's choice for the
    architecture."""


class Method(base.Method):
    """Updates of linear layers that are Kronecker products."""

    Config = Config
    card = base.Card(
        title="KronA",
        paper="Edalati et al. 2022, arXiv 2212.10650",
        category="lora",
        summary="A Kronecker product A kron B beside each chosen linear layer: few parameters, yet of full rank.",
        trains="A and B of every target",
        count="sum over targets of a1 * a2 + b1 * b2, where a1 * b1 = d_out and a2 * b2 = d_in",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        mergeable=True,
        supports=frozenset({"gradient_checkpointing", "resume"}),
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return the sum over targets of a1 * a2 + b1 * b2, and a classifier's head."""
        shapes = map(self._shapes, self._chosen(model).values())
        return sum(a1 * a2 + b1 * b2 for (a1, a2), (b1, b2) in shapes) + _heads.head_parameters(model)

    def notices(self, model: PreTrainedModel) -> list[str]:
        """Return the shapes of A and B, which follow from `factor` and the sides of the targets."""
        names: dict[tuple[Shape, Shape], list[str]] = {}
        for name, module in self._chosen(model).items():
            names.setdefault(self._shapes(module), []).append(name)
        return [
            f"A {a} kron B {b}: {', '.join(_targets.suffixes(model, matched))}" for (a, b), matched in names.items()
        ]

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Attach A and B to the targets."""
        from peft import LoKrConfig, get_peft_model

        from peftctl.tuners.float32_copy import widen_copies
        from peftctl.tuners.kron_linear import lean_training

        chosen = self._chosen(model)
        # peft splits B in two where this is less than half of its longer side, and divides the scale by it.
        r = max(side for module in chosen.values() for side in self._shapes(module)[1])
        config = LoKrConfig(
            task_type=TASK_TYPES[context.recipe.model.task],
            r=r,
            alpha=self.config.scale * r,  # type: ignore[arg-type]  # peft computes with any number
            decompose_both=False,
            decompose_factor=self.config.factor,
            target_modules=_targets.suffixes(model, chosen),
            modules_to_save=_heads.head_names(model) or None,
        )
        with model.device if model.device.type == "meta" else nullcontext():
            peft_model = get_peft_model(model, config)
        widen_copies(peft_model)
        lean_training(peft_model)
        return peft_model

    def export(self, model: Any) -> Any:
        """Return the adapter, with a classifier's head in the base's type, as peft loads it."""
        from peftctl.tuners.float32_copy import narrow_copies

        narrow_copies(model)
        return model

    def _shapes(self, module: nn.Module) -> tuple[Shape, Shape]:
        """Return the shapes of A and B, as peft chooses them."""
        from peft.tuners.lokr.layer import factorization

        d_in, d_out = _targets.in_out_features(module)
        (a1, b1), (a2, b2) = factorization(d_out, self.config.factor), factorization(d_in, self.config.factor)
        return (a1, a2), (b1, b2)

    def _chosen(self, model: PreTrainedModel) -> dict[str, Any]:
        from torch import nn

        heads = tuple(f"{name}." for name in _heads.head_names(model))
        matched = _targets.matched_modules(model, _targets.resolve_targets(model, self.config.target_modules))
        chosen = {name: module for name, module in matched.items() if not f"{name}.".startswith(heads)}
        if not chosen:
            raise UsageError("method.target_modules: holds only the head, which trains whole; name layers of the model")
        for name, module in chosen.items():
            if not isinstance(module, nn.Linear):
                kind = type(module).__name__
                raise UsageError(f"method.target_modules: {name} is a {kind}; krona takes nn.Linear only")
        return chosen
