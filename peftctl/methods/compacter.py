"""Compacter: low-rank hypercomplex adapters, Karimi Mahabadi et al. 2021 (https://arxiv.org/abs/2106.04647).

    change(h) = P_up φ(P_down h),   P x = W^T x + b,   W = Σ_{i=1..n} A_i ⊗ (s_i t_i)

stands where Houlsby's adapter does: behind attention and the feed-forward part of every block, or behind the
feed-forward part alone (`plus`, the paper's Compacter++). Between widths k and l, s_i is (k/n, r) and t_i (r, l/n), of
each P its own; A_i, (n, n), are the same in all P of the model, down and up alike, and are saved once. The norms of the
whole model train too (`train_norms`), as copies beside the base's.

As in the authors' code s and t are Glorot-uniform with a gain of √2, A has a standard deviation of 1e-4 and the biases
are 0. A appears in the down- and in the up-projection, so the first change is of the order of 1e-8 and the model starts
as the base but for rounding. A factor that is exactly 0 would make that exact, and with it the first gradient of A,
which is what all layers wait for: s and t have gradients of 1e-8 until A has grown.

Not verified: the paper's claim to be on par with full fine-tuning on GLUE at 0.047% of T5-base's parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from peftctl.errors import UsageError
from peftctl.methods import base
from peftctl.methods._bottleneck import BottleneckKeys, BottleneckMethod, Chosen, behind
from peftctl.recipe.schema import Positive

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class Config(BottleneckKeys):
    """The `method:` section of Compacter."""

    name: Literal["compacter"] = "compacter"
    bottleneck: Positive = 32
    """m: width of the bottleneck."""
    hypercomplex: Positive = 4
    """n: terms of the sum, and the side of A_i; divides m and the widths of the model."""
    rank: Positive = 1
    """r: of s_i t_i."""
    activation: Literal["gelu_new", "gelu", "relu", "silu"] = "gelu_new"  # type: ignore[assignment]
    """φ."""
    init_std: Annotated[float, Field(gt=0)] = 1e-4
    """Standard deviation of A at first."""
    train_norms: bool = True
    """Train the scales and shifts of all LayerNorms or RMSNorms too."""
    plus: bool = False
    """Compacter++: adapters behind feed-forward parts only."""
    target_modules: str | list[str] | None = None
    """Linear layers that an adapter follows: name suffixes, or a regular expression. Left out, the output projection
    of every sublayer, or with `plus` of every feed-forward part."""

    @model_validator(mode="after")
    def _n_divides_m(self) -> Config:
        n, m = self.hypercomplex, self.bottleneck
        if m % n:
            below = [f"{m - m % n}"] if m > n else []
            fitting = " or ".join([*below, f"{m + n - m % n}"])
            raise ValueError(f"bottleneck: expected a multiple of hypercomplex, {n}, got {m}; take {fitting}")
        return self


class Method(BottleneckMethod):
    """Bottleneck adapters of Kronecker products that share one factor."""

    Config = Config
    config: Any
    card = base.Card(
        title="Compacter",
        paper="Karimi Mahabadi et al. 2021, arXiv 2106.04647",
        category="adapter",
        summary="Bottleneck adapters whose matrices are sums of Kronecker products, one factor shared by all layers.",
        trains="s, t and biases of the adapters; A, once; scales and shifts of all norms; a classifier's head",
        count="n^3 + adapters * (2r(d + m) + m + d), two adapters a block, one with plus; plus the norms and the head",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        merge_note="the adapter is not linear, no weight of the base can take it up",
        supports=frozenset({"4bit", "8bit", "gradient_checkpointing", "resume"}),
    )

    def chosen(self, model: PreTrainedModel) -> Chosen:
        """Return what the sublayers end with.

        Raises:
            UsageError: n does not divide m, or the width of a target.
        """
        c = self.config
        chosen = behind(model, c.target_modules, "compacter", ("mlp",) if c.plus else ("attention", "mlp"))
        for name, d in chosen.widths.items():
            if d % c.hypercomplex:
                raise UsageError(
                    f"method.hypercomplex: expected a divisor of {d}, the width of {name}, got {c.hypercomplex}"
                )
        return chosen

    def parameters(self, d: int) -> int:
        """Return the parameters of one adapter of width d, without A."""
        m, r = self.config.bottleneck, self.config.rank
        return 2 * r * (d + m) + m + d

    def count(self, model: PreTrainedModel) -> int:
        """Return n^3 once, and what the adapters have of their own, the norms and a new head."""
        return super().count(model) + self.config.hypercomplex**3

    def tuner_config(self, **fields: Any) -> Any:
        """Return the configuration of `tuners/hypercomplex.py`."""
        from peftctl.tuners.hypercomplex import HypercomplexConfig

        c = self.config
        return HypercomplexConfig(**fields, n=c.hypercomplex, rank=c.rank)

    def whole(self, model: PreTrainedModel) -> Mapping[str, nn.Module]:
        """Return the norms, where they train."""
        from peftctl.models.anatomy import norms

        return norms(model) if self.config.train_norms else {}
