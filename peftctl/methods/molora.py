"""MoLoRA: Pushing Mixture of Experts to the Limit, Zadouri et al., ICLR 2024 (https://arxiv.org/abs/2309.05444).

    y = W x + (alpha / r) Σ_e p_e B_e A_e x,   p = softmax(R x)
    A_e: (r, d_in), B_e: (d_out, r), R: (E, d_in) without bias; every target has its own

Every token has all E experts, weighed by p. Mixing the experts' parameters, as the paper writes it, and mixing their
outputs is the same, as both maps are linear. A and R start from N(0, 0.02^2) and B at 0, so the model starts as the
base exactly. With `k`, a token has the k most probable experts only; as in the authors' code their p are not scaled to
the sum 1 then. Their balancing loss and z-loss, which they do not use either, are not here.

The paper tunes T5 with Adafactor at 3e-4; here the recipe's optimizer is any.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import model_validator

from peftctl.methods import _routed, base
from peftctl.recipe.schema import Positive


class Config(_routed.RoutedKeys):
    """The `method:` section of MoLoRA."""

    name: Literal["molora"] = "molora"
    experts: Positive = 8
    """E."""
    k: Positive | None = None
    """How many experts a token has; left out, all of them."""

    @model_validator(mode="after")
    def _enough(self) -> Config:
        if self.k is not None and self.k > self.experts:
            raise ValueError(f"k: expected at most experts, which is {self.experts}, got {self.k}; lower it")
        return self


class Method(_routed.RoutedLoraMethod):
    """A dense mixture of LoRA experts."""

    Config = Config
    config: Any
    card = base.Card(
        title="MoLoRA",
        paper="Zadouri et al. 2024, arXiv 2309.05444",
        category="lora",
        summary="Several LoRA experts beside every layer; a router weighs all of them, token by token.",
        trains="A and B of every expert, and the router, of every target; a classifier's head",
        count=_routed.COUNT,
        tasks=_routed.TASKS,
        merge_note=_routed.MERGE_NOTE,
        supports=_routed.SUPPORTS,
    )
    init: ClassVar[Any] = "normal"

    @property
    def k(self) -> int | None:
        """How many experts a token has; None for all."""
        return self.config.k
