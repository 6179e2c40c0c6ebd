"""rsLoRA: rank-stabilised LoRA, Kalajdzievski 2023 (https://arxiv.org/abs/2312.03732).

    y = W x + b + (alpha / sqrt(r)) B A dropout(x),   A: (r, d_in), B: (d_out, r)

LoRA with another scale. The entries of B A x grow like sqrt(r), so LoRA's alpha / r makes updates and their gradients
smaller the higher the rank, and alpha / sqrt(r) keeps them: high ranks learn. A layer of `rank_pattern` has the scale
of its own r. An alpha that was tuned for LoRA means a sqrt(r) times larger scale here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftctl.methods import base
from peftctl.methods._lora import LoraKeys, LoraMethod
from peftctl.methods.lora import Method as Lora
from peftctl.recipe.schema import Positive


class Config(LoraKeys):
    """The `method:` section of rsLoRA."""

    name: Literal["rslora"] = "rslora"
    r: Positive = 64
    """Rank of the update; below 32 there is little to stabilise."""
    alpha: Annotated[float, Field(gt=0)] = 16
    """Scale: the update is multiplied by alpha / sqrt(r)."""


class Method(LoraMethod):
    """LoRA whose update keeps its size as r grows."""

    Config = Config
    peft_options: ClassVar[Mapping[str, Any]] = {"use_rslora": True}
    card = base.Card(
        title="rsLoRA",
        paper="Kalajdzievski 2023, arXiv 2312.03732",
        category="lora",
        summary="LoRA scaled by alpha / sqrt(r) instead of alpha / r, so that high ranks learn more than low ones.",
        trains="A and B of every target",
        count=Lora.card.count,
        tasks=Lora.card.tasks,
        mergeable=True,
        supports=Lora.card.supports,
    )
