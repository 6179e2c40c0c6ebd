"""The Pfeiffer adapter, of AdapterFusion: Pfeiffer et al. 2020 (https://arxiv.org/abs/2005.00247), and of MAD-X.

One adapter in every block, at its end, D: (m, d), b1: (m,), U: (d, m), b2: (d,):

    change(x) = U φ(D x + b1) + b2
    exact, blocks that return the residual stream y (Llama, GPT-2, T5):   y + change(y)
    exact, blocks that end with LN(z), z = h + residual (BERT, BART):     LN(z + change(LN(z)))
    simple:                                                               h + change(h)

with h what the feed-forward part returns. In the exact form of post-norm models the block's frozen LayerNorm is applied
twice: to what the adapter reads, and to the sum. Pre-norm models have no LayerNorm there, and the adapter reads the
stream as it is, as in AdapterHub's library. `simple` is Houlsby's adapter without the one behind attention; on BERT it
stands before the sublayer's dropout, the exact one after it. Nothing else trains: unlike Houlsby's, norms are frozen.

D is drawn from N(0, init_std^2), cut off at two deviations. The library draws U alike, without cutting either off; here
U is 0 and the model starts as the base exactly, at the cost of D's first gradient.

Not verified: the paper's search over placements chose this one at Houlsby's accuracy; learning rate and epochs are the
ones usually given for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from peftctl.methods import base
from peftctl.methods._bottleneck import BottleneckKeys, BottleneckMethod, Chosen, around, behind

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Config(BottleneckKeys):
    """The `method:` section of the Pfeiffer adapter."""

    name: Literal["pfeiffer"] = "pfeiffer"
    variant: Literal["exact", "simple"] = "exact"
    """Where the adapter stands: at the end of the block, or behind its feed-forward part."""
    target_modules: str | list[str] | None = None
    """For `simple`: linear layers that an adapter follows, as name suffixes or a regular expression. Left out, the
    output projection of every feed-forward part."""

    @model_validator(mode="after")
    def _targets_are_of_simple(self) -> Config:
        if self.variant == "exact" and self.target_modules is not None:
            raise ValueError(
                "target_modules: linear layers are for variant: simple; the exact one stands at the ends of blocks. "
                "Set variant: simple, or leave target_modules out"
            )
        return self


class Method(BottleneckMethod):
    """One bottleneck adapter at the end of every block."""

    Config = Config
    config: Any
    card = base.Card(
        title="Pfeiffer adapter",
        paper="Pfeiffer et al. 2020, arXiv 2005.00247",
        category="adapter",
        summary="One small two-layer perceptron with a skip connection at the end of every block; norms stay frozen.",
        trains="D, U and biases of the adapters; a classifier's head",
        count="L * (2dm + m + d), plus the head",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        merge_note="the adapter is not linear, no weight of the base can take it up",
        supports=frozenset({"4bit", "8bit", "gradient_checkpointing", "resume"}),
    )

    def chosen(self, model: PreTrainedModel) -> Chosen:
        """Return the ends of blocks, or what their feed-forward parts end with."""
        if self.config.variant == "exact":
            return around(model)
        return behind(model, self.config.target_modules, "pfeiffer", ("mlp",))
