"""Full fine-tuning: every parameter trains. The baseline that the others are measured against.

Weights are kept in float32 and the forward runs under autocast in the recipe's dtype: bfloat16 weights would round
away updates smaller than 2^-8 of their value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from peftctl.methods import base

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Config(base.MethodConfig):
    """The `method:` section of full fine-tuning."""

    name: Literal["full"] = "full"


class Method(base.Method):
    """All parameters, tied ones counted once."""

    Config = Config
    autocast = True
    card = base.Card(
        title="Full fine-tuning",
        paper="the baseline of every paper here",
        category="baseline",
        summary="Every weight trains; the result is a whole model.",
        trains="all parameters",
        count="all parameters, tied ones once",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        merge_note="the result is a whole model already",
        disable_note="there is no adapter: the weights themselves are other ones",
        supports=frozenset({"new_tokens", "gradient_checkpointing", "resume"}),
    )

    def load_options(self) -> base.LoadOptions:
        """Ask for float32 master weights."""
        return base.LoadOptions(dtype="float32")

    def count(self, model: PreTrainedModel) -> int:
        """Return the number of parameters, tied ones once."""
        return sum(parameter.numel() for parameter in model.parameters())

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Let every parameter train."""
        return model.requires_grad_(True)
