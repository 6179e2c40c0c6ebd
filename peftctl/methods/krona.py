"""KronA: Kronecker adapter, Edalati et al. 2022 (https://arxiv.org/abs/2212.10650).

    y = W x + b + s (A kron B) x                     variant kron: beside linear layers
    y = FFN(x) + s (A kron B) x                      variant B: beside feed-forward blocks
    y = FFN(x) + s (A kron B) x + l x                variant Bres: with a trained multiple of the block's input
    A: (a1, a2), B: (b1, b2), a1 b1 = d_out, a2 b2 = d_in, l: one number; d_out = d_in = d of a block

The base stays frozen; A, B and l train. A is zero at first and B is drawn Kaiming-uniform, U(-1/sqrt(b2), 1/sqrt(b2)),
so the model starts as the base; the paper sets one factor to zero. rank(A kron B) = rank A * rank B, so the update can
have full rank. a1 is `factor` where that divides d_out, else the divisor of d_out below it that makes A and B most
alike; a2 of d_in likewise. The result of variant kron is an adapter of peft's LoKr whose factors are whole; that of the
others has a type of our own. There x is what the block's first linear layer reads, and the sum is made where its last
one returns, before dropout. l is 0 at first, so that every variant starts as the base. Not verified: which factor the
paper sets to zero, its s, and how it starts l.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from peftctl.errors import UsageError
from peftctl.methods import _heads, _targets, base
from peftctl.methods._lora import TASK_TYPES
from peftctl.recipe.schema import Positive

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

Shape = tuple[int, int]


class Config(base.AdapterConfig):
    """The `method:` section of KronA."""

    name: Literal["krona"] = "krona"
    variant: Literal["kron", "B", "Bres"] = "kron"
    """`kron` beside linear layers, `B` beside feed-forward blocks, `Bres` likewise with a trained multiple of the
    block's input on top. B and Bres can't be merged."""
    factor: Positive = 16
    """Rows and columns of A, as near as the sides of each target allow."""
    scale: Annotated[float, Field(gt=0)] = 1.0
    """s: the update is multiplied by it."""
    target_modules: str | list[str] | None = None
    """Name suffixes, a regular expression, or `all-linear`, `attention`, `mlp`; left out, peft's choice for the
    architecture. Of B and Bres the last linear layers of blocks, e.g. [down_proj]; left out, those of all blocks."""


class Method(base.Method):
    """Updates of linear layers that are Kronecker products."""

    Config = Config
    card = base.Card(
        title="KronA",
        paper="Edalati et al. 2022, arXiv 2212.10650",
        category="lora",
        summary="A Kronecker product A kron B beside each chosen linear layer, or beside whole feed-forward blocks: "
        "few parameters, yet of full rank.",
        trains="A and B of every target; with variant Bres one number more",
        count="sum over targets of a1 * a2 + b1 * b2, where a1 * b1 = d_out and a2 * b2 = d_in; + 1 a block with Bres",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        mergeable=True,
        merge_note="variant kron only: beside a block, which is not linear, no weight can take up B and Bres",
        supports=frozenset({"gradient_checkpointing", "resume"}),
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return the sum over targets of a1 * a2 + b1 * b2 (+ 1 with Bres), and a classifier's head."""
        shapes = [self._shapes(*sides) for sides in self._sides(model).values()]
        factors = sum(a1 * a2 + b1 * b2 for (a1, a2), (b1, b2) in shapes)
        residuals = len(shapes) if self.config.variant == "Bres" else 0
        return factors + residuals + _heads.head_parameters(model)

    def notices(self, model: PreTrainedModel) -> list[str]:
        """Return the shapes of A and B, which follow from `factor` and the sides of the targets."""
        names: dict[tuple[Shape, Shape], list[str]] = {}
        for name, sides in self._sides(model).items():
            names.setdefault(self._shapes(*sides), []).append(name)
        return [
            f"A {a} kron B {b}: {', '.join(_targets.suffixes(model, matched))}" for (a, b), matched in names.items()
        ]

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Attach A and B to the targets."""
        from peft import get_peft_model

        from peftctl.tuners.float32_copy import widen_copies
        from peftctl.tuners.kron_linear import lean_training

        config = self._beside_layers(model) if self.config.variant == "kron" else self._beside_blocks(model)
        config.task_type = TASK_TYPES[context.recipe.model.task]  # type: ignore[assignment]  # its value
        config.modules_to_save = self._whole(model) or None  # type: ignore[attr-defined]  # both types have it
        with model.device if model.device.type == "meta" else nullcontext(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            peft_model = get_peft_model(model, config)
        widen_copies(peft_model)
        lean_training(peft_model)
        return peft_model

    def _whole(self, model: PreTrainedModel) -> list[str]:
        """Return the modules of a classifier's head that peft must be told of; LoKr takes all of them."""
        kron = self.config.variant == "kron"
        return _heads.head_names(model) if kron else _heads.unknown_to_peft(model)

    def _beside_layers(self, model: PreTrainedModel) -> PeftConfig:
        from peft import LoKrConfig

        sides = self._sides(model)
        # peft splits B in two where this is less than half of its longer side, and divides the scale by it.
        r = max(side for own in sides.values() for side in self._shapes(*own)[1])
        return LoKrConfig(
            r=r,
            alpha=self.config.scale * r,  # type: ignore[arg-type]  # peft computes with any number
            decompose_both=False,
            decompose_factor=self.config.factor,
            target_modules=_targets.suffixes(model, sides),
        )

    def _beside_blocks(self, model: PreTrainedModel) -> PeftConfig:
        from peftctl.tuners.kron_block import KronBlockConfig

        blocks, sides = self._blocks(model), self._sides(model)
        ((a, b),) = {self._shapes(*own) for own in sides.values()}  # all blocks return states of the model's width
        return KronBlockConfig(
            shape_a=list(a),
            shape_b=list(b),
            scale=self.config.scale,
            residual=self.config.variant == "Bres",
            entries=blocks,
            target_modules=_targets.suffixes(model, blocks),
        )

    def export(self, model: Any) -> Any:
        """Return the adapter, with a classifier's head in the base's type, as peft loads it."""
        from peftctl.tuners.float32_copy import narrow_copies

        narrow_copies(model)
        return model

    def _shapes(self, d_in: int, d_out: int) -> tuple[Shape, Shape]:
        """Return the shapes of A and B, as peft chooses them."""
        from peft.tuners.lokr.layer import factorization

        (a1, b1), (a2, b2) = factorization(d_out, self.config.factor), factorization(d_in, self.config.factor)
        return (a1, a2), (b1, b2)

    def _sides(self, model: PreTrainedModel) -> dict[str, tuple[int, int]]:
        """Return (d_in, d_out) of what each A kron B stands beside, by the name of the layer that adds it."""
        if self.config.variant == "kron":
            return {name: _targets.in_out_features(module) for name, module in self._chosen(model).items()}
        modules = {name: model.get_submodule(name) for pair in self._blocks(model).items() for name in pair}
        width = {name: _targets.in_out_features(module) for name, module in modules.items()}
        return {end: (width[entry][0], width[end][1]) for end, entry in self._blocks(model).items()}

    def _blocks(self, model: PreTrainedModel) -> dict[str, str]:
        """Return the last linear layer of each chosen feed-forward block -> its first one.

        Raises:
            UsageError: A target ends no feed-forward block, or the architecture's blocks are not known.
        """
        from peftctl.models.anatomy import linear_parts, sublayer_ends

        linear = _targets.matched_modules(model, "all-linear")
        ends, entries, first = sublayer_ends(model, linear)["mlp"], {}, None
        for name in linear_parts(model, linear)["mlp"]:  # block after block
            first = first or name
            if name in ends:
                entries[name], first = first, None
        if self.config.target_modules is None:
            return entries
        chosen = list(_targets.matched_modules(model, self.config.target_modules))
        for name in chosen:
            if name not in entries:
                raise UsageError(
                    f"method.target_modules: {name} does not end a feed-forward block, beside which variant "
                    f"{self.config.variant} stands; leave it out for all blocks, or name among: "
                    f"{', '.join(_targets.suffixes(model, entries))}"
                )
        return {name: entries[name] for name in chosen}

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
