"""PiSSA: Principal Singular values and Singular vectors Adaptation, Meng et al. 2024 (https://arxiv.org/abs/2404.02948).

    W = U S V^T,   A_0 = (S_r / s)^(1/2) V_r^T: (r, d_in),   B_0 = U_r (S_r / s)^(1/2): (d_out, r),   s = alpha / r
    y = (W - s B_0 A_0) x + b + s B A x

The r largest singular values of W train, the rest of W is frozen. The paper has alpha = r; as peft, we divide S by s,
so that s B_0 A_0 is that part of W for any alpha. Unlike the authors' code and peft we don't write W - s B_0 A_0 into
the base: W stays, and frozen factors -B_0 and A_0 stand beside B and A. So the model starts as the base exactly,
whatever the rounding, and the result, s (B A - B_0 A_0), is an ordinary LoRA of rank 2 r on the original base, which
the authors make by a conversion. `svd: fast` is their fast SVD, Halko's randomised one with `niter` power iterations.
Over a quantised base, QPiSSA stores W - s B_0 A_0 in 4 bits; that needs another base and is not done here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from peftctl.methods import base
from peftctl.methods._fixed import StartKeys, StartMethod
from peftctl.recipe.schema import Count

if TYPE_CHECKING:
    import torch


class Config(StartKeys):
    """The `method:` section of PiSSA."""

    name: Literal["pissa"] = "pissa"
    svd: Literal["exact", "fast"] = "exact"
    """`exact` decomposes every target whole; `fast` finds its r largest singular values by a randomised algorithm."""
    niter: Count = 16
    """Power iterations of the fast SVD: more are more exact."""


class Method(StartMethod):
    """LoRA that starts from the principal part of the weights."""

    Config = Config
    config: Any
    card = base.Card(
        title="PiSSA",
        paper="Meng et al. 2024, arXiv 2404.02948",
        category="lora",
        summary="LoRA that trains the r largest singular values of each weight with their vectors, instead of noise.",
        trains="A and B of every target",
        count="sum over targets of r * (d_in + d_out); plus modules_to_save. What is saved has rank 2 r",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        mergeable=True,
        supports=frozenset({"gradient_checkpointing", "resume", "new_tokens"}),
    )

    def start(self, w: torch.Tensor, r: int, scale: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A_0 and B_0 from the r largest singular values of W."""
        import torch

        if self.config.svd == "exact":
            u, values, vt = torch.linalg.svd(w, full_matrices=False)
        else:
            # The library draws from the global random state: it must neither decide the result nor be moved by it.
            with torch.random.fork_rng([w.device] if w.device.type == "cuda" else []):
                torch.manual_seed(seed)
                u, values, v = torch.svd_lowrank(w, q=r, niter=self.config.niter)
            vt = v.T
        root = (values[:r] / scale).sqrt()
        return root[:, None] * vt[:r], u[:, :r] * root
