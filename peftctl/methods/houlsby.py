"""Adapter tuning: Parameter-Efficient Transfer Learning for NLP, Houlsby et al. 2019 (https://arxiv.org/abs/1902.00751).

    A(h) = h + U φ(D h + b1) + b2,   D: (m, d), b1: (m,), U: (d, m), b2: (d,)

stands behind every sublayer: where attention and the feed-forward part return their output, before it is added to the
residual stream. A decoder with cross-attention has three in a block. All else is frozen, but for the LayerNorm or
RMSNorm parameters of the whole model, which train too (`train_norms`), as copies beside the base's.

D is drawn from N(0, init_std^2), cut off at two deviations, as in the paper's code. There U is drawn alike, so that
the model starts near the base; here U is 0 and it starts as the base exactly, at the cost of D's first gradient. On
BERT the paper's adapter comes behind the sublayer's dropout, ours before it: the same outside of training.
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
    from torch import nn
    from transformers import PreTrainedModel


class Config(base.AdapterConfig):
    """The `method:` section of adapter tuning."""

    name: Literal["houlsby"] = "houlsby"
    bottleneck: Positive = 64
    """m: width of the bottleneck."""
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    """φ."""
    init_std: Annotated[float, Field(gt=0)] = 1e-3
    """Standard deviation of D at first."""
    train_norms: bool = True
    """Train the scales and shifts of all LayerNorms or RMSNorms too."""
    target_modules: str | list[str] | None = None
    """Linear layers that an adapter follows: name suffixes, or a regular expression. Left out, the output projection
    of every sublayer."""


class Method(base.Method):
    """Two bottleneck adapters in every block, and the norms."""

    Config = Config
    card = base.Card(
        title="Adapter tuning",
        paper="Houlsby et al. 2019, arXiv 1902.00751",
        category="adapter",
        summary="A small two-layer perceptron with a skip connection behind attention and feed-forward in every block.",
        trains="D, U and biases of the adapters; scales and shifts of all norms; a classifier's head",
        count="L * 2 * (2dm + m + d), plus 2dm + m + d for each cross-attention, plus the norms and the head",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        merge_note="the adapter is not linear, no weight of the base can take it up",
        supports=frozenset({"4bit", "8bit", "gradient_checkpointing", "resume"}),
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return 2dm + m + d over the targets, plus the norms, plus a new head."""
        m = self.config.bottleneck
        widths = (_targets.in_out_features(target)[1] for target in self._chosen(model).values())
        norms = sum(p.numel() for norm in self._norms(model).values() for p in norm.parameters())
        return sum(2 * d * m + m + d for d in widths) + norms + _heads.head_parameters(model)

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Put an adapter behind every target, and copies of the norms beside them."""
        from peft import get_peft_model

        from peftctl.tuners.bottleneck import BottleneckConfig
        from peftctl.tuners.float32_copy import widen_copies

        config = BottleneckConfig(
            task_type=TASK_TYPES[context.recipe.model.task],
            bottleneck=self.config.bottleneck,
            activation=self.config.activation,
            init_std=self.config.init_std,
            target_modules=_targets.suffixes(model, self._chosen(model)),
            modules_to_save=[*_targets.suffixes(model, self._norms(model)), *_heads.unknown_to_peft(model)] or None,
        )
        # Without weights there is nothing to draw or copy; torch says so of every tensor.
        with model.device if model.device.type == "meta" else nullcontext(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            peft_model = get_peft_model(model, config)
        widen_copies(peft_model)
        return peft_model

    def export(self, model: Any) -> Any:
        """Return the adapter, with norms in the base's type: that is what peft turns them to when it loads."""
        from peftctl.tuners.float32_copy import narrow_copies

        narrow_copies(model)
        return model

    def _chosen(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        from torch import nn

        from peftctl.models.anatomy import sublayer_ends

        if self.config.target_modules is None:
            linear = _targets.matched_modules(model, "all-linear")
            ends = {name for names in sublayer_ends(model, linear).values() for name in names}
            return {name: module for name, module in linear.items() if name in ends}
        chosen = _targets.matched_modules(model, self.config.target_modules)
        for name, module in chosen.items():
            if isinstance(module, nn.Embedding):
                raise UsageError(f"method.target_modules: {name} is an embedding; houlsby takes linear layers only")
        return chosen

    def _norms(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        from peftctl.models.anatomy import norms

        return norms(model) if self.config.train_norms else {}
