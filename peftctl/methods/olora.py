"""OLoRA: orthonormal low-rank adaptation, Büyükakyüz 2024 (https://arxiv.org/abs/2406.01775).

    W = Q R,   B_0 = Q[:, :r]: (d_out, r), orthonormal columns,   A_0 = R[:r]: (r, d_in), upper trapezoidal
    y = (W - s B_0 A_0) x + b + s B A x,   s = alpha / r

Training does not keep B orthonormal. B_0 spans the first r columns of W, not its most important directions. Unlike the
paper and peft we don't write W - s B_0 A_0 into the base: W stays, and frozen factors -B_0 and A_0 stand beside B and
A. So the model starts as the base exactly, and the result, s (B A - B_0 A_0), is an ordinary LoRA of rank 2 r on the
original base. peft decomposes GPT-2's Conv1D in the wrong orientation; W is (d_out, d_in) here for every layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from peftctl.methods import base
from peftctl.methods._fixed import StartKeys, StartMethod

if TYPE_CHECKING:
    import torch


class Config(StartKeys):
    """The `method:` section of OLoRA."""

    name: Literal["olora"] = "olora"


class Method(StartMethod):
    """LoRA that starts from a QR decomposition of the weights."""

    Config = Config
    card = base.Card(
        title="OLoRA",
        paper="Büyükakyüz 2024, arXiv 2406.01775",
        category="lora",
        summary="LoRA whose B starts with orthonormal columns and A with their coefficients, from W = Q R.",
        trains="A and B of every target",
        count="sum over targets of r * (d_in + d_out); plus modules_to_save. What is saved has rank 2 r",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        mergeable=True,
        supports=frozenset({"gradient_checkpointing", "resume", "new_tokens"}),
    )

    def start(self, w: torch.Tensor, r: int, scale: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A_0 and B_0 from the QR decomposition of W."""
        import torch

        q, upper = torch.linalg.qr(w)
        return upper[:r], q[:, :r]
