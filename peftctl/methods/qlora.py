"""QLoRA: LoRA over a base in 4 bits, Dettmers et al. 2023 (https://arxiv.org/abs/2305.14314).

    y = dequant(W_nf4) x + b + (alpha / r) B A dropout(x),   A: (r, d_in), B: (d_out, r)

W is stored as NF4: in blocks of 64 weights, the block's largest |w| and, of each weight, the nearest of 16 quantiles of
a normal distribution. The scales are quantised again, to 8 bits in blocks of 256, so a weight takes 4.127 bits.
Gradients pass through the dequantised weight to x; A and B train in float32, on every linear layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from peftctl.methods import base
from peftctl.methods._lora import LoraKeys, LoraMethod
from peftctl.methods.lora import Method as Lora


class Config(LoraKeys):
    """The `method:` section of QLoRA."""

    name: Literal["qlora"] = "qlora"
    target_modules: str | list[str] | None = "all-linear"
    """Name suffixes, a regular expression, or `all-linear`, `attention`, `mlp`. The paper adapts every linear layer."""


class Method(LoraMethod):
    """LoRA whose frozen weights are NF4 with double quantisation."""

    Config = Config
    defaults: ClassVar[Mapping[str, Any]] = {
        "quantization.bits": 4,
        "quantization.type": "nf4",
        "quantization.double_quant": True,
        "train.optimizer": "paged_adamw_32bit",
    }
    card = base.Card(
        title="QLoRA",
        paper="Dettmers et al. 2023, arXiv 2305.14314",
        category="lora",
        summary="LoRA on every linear layer over a base stored in 4 bits: a 65B model trains on one 48 GB GPU.",
        trains="A and B of every target",
        count=Lora.card.count,
        mergeable=True,
        identity_note="equal to the quantised base, which itself differs from the original",
        needs="bitsandbytes. Norms and embeddings keep model.dtype; the authors' script casts them to float32.",
        supports=Lora.card.supports,
    )
