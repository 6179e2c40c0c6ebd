"""LoRA: Low-Rank Adaptation, Hu et al. 2021 (https://arxiv.org/abs/2106.09685).

    y = W x + b + (alpha / r) B A dropout(x),   A: (r, d_in), B: (d_out, r)

W and b stay frozen; A and B train. B starts at zero, so the model starts as the base. The paper draws A from a
Gaussian; peft and the authors' loralib draw it Kaiming-uniform, U(-1/sqrt(d_in), 1/sqrt(d_in)), and so do we unless
`init: gaussian` is set, which is N(0, 1/r^2). Beside an embedding A: (r, tokens) is zero and B is drawn from N(0, 1).
"""

from __future__ import annotations

from typing import Literal

from peftctl.methods import base
from peftctl.methods._lora import LoraKeys, LoraMethod


class Config(LoraKeys):
    """The `method:` section of LoRA."""

    name: Literal["lora"] = "lora"


class Method(LoraMethod):
    """Low-rank updates of linear layers."""

    Config = Config
    card = base.Card(
        title="LoRA",
        paper="Hu et al. 2021, arXiv 2106.09685",
        category="lora",
        summary="A low-rank update B A beside each chosen linear layer; folds into the weights without cost.",
        trains="A and B of every target",
        count="sum over targets of r * (d_in + d_out), d_out of the trained parts; plus modules_to_save and new rows",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        mergeable=True,
        supports=frozenset({"gradient_checkpointing", "resume", "4bit", "8bit", "new_tokens"}),
    )
