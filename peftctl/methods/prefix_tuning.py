"""Prefix tuning, Li & Liang 2021 (https://arxiv.org/abs/2101.00190).

In every layer, n trained keys and values stand before those of the text (section 4.2):

    head(x) = softmax(q [P_k; K]^T / sqrt(d_h)) [P_v; V],   P_k, P_v: (n, d_h) a head

They occupy positions 0 to n - 1, so the text begins at n; keys get no rotation. In training a network makes them from
a table E, because training them directly was unstable (section 4.3); only its output is kept:

    P = W2 tanh(W1 E + b1) + b2,   E: (n, h_kv d_h), W1: (m, h_kv d_h), W2: (2 L h_kv d_h, m)

Where we, or peft, differ from the paper:
- E is h_kv d_h wide as in peft, in the paper d. The two are equal without grouped-query attention.
- The table starts as N(0, 1) as in the authors' code, the network as PyTorch's layers do.
- `init_text` starts from the activations of real words (section 7.4). The authors fit their network to them with 500
  steps of Adam; we solve for its last layer, which is exact.
- Of an encoder-decoder only the decoder's self-attention has a prefix, which is all that plain peft can load. Its own
  layout gives layers i and i + L/2 one prefix there; ours gives every layer its own. `everywhere` adds the paper's two
  others, in the encoder and in cross-attention. The three are independent; then the network is one a layer,
  (h_kv (d_k + d_v), m) behind its W1, and prefixes take no position.
- peft runs the network once a row of the batch and can't go on from its tensors; neither holds here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from peftctl.errors import UsageError
from peftctl.methods import _union, base
from peftctl.methods._prefix import CHECKPOINTING, IDENTITY_NOTE, MERGE_NOTE, PrefixKeys, PrefixMethod

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftctl.tuners.prefix import TrainedPrefix


class Config(PrefixKeys):
    """The `method:` section of prefix tuning."""

    name: Literal["prefix_tuning"] = "prefix_tuning"
    projection: bool = True
    """Train a small network that makes the keys and values, as the paper does; only what it makes is saved."""
    init_text: str | None = None
    """Start from the keys and values of this text, repeated or cut to `num_virtual_tokens`; left out, at random."""
    everywhere: bool = False
    """Of an encoder-decoder, as in the paper: further prefixes in the encoder and in cross-attention."""

    @model_validator(mode="after")
    def _everywhere_is_plain(self) -> Config:
        for key in ("init_text", "dropout"):
            if self.everywhere and getattr(self, key):
                raise ValueError(f"{key}: not with everywhere: true; remove one of them")
        return self


class Method(PrefixMethod):
    """Trained keys and values before every layer's own, made by a network that is dropped in the end."""

    config: Config
    Config = Config
    card = base.Card(
        title="Prefix tuning",
        paper="Li & Liang 2021, arXiv 2101.00190",
        category="prompt",
        summary="n trained keys and values stand before those of the text in every attention layer.",
        trains="the prefix, or the network that makes it; the base is frozen",
        count="n * 2L*kv; with projection n*kv + (kv*m + m) + (m*2L*kv + 2L*kv), of which n * 2L*kv are kept; "
        "everywhere: n * 2kv in each of 3L layers, or n*kv + (kv + 1)m + (m + 1)2kv",
        tasks=("causal_lm", "seq2seq_lm"),
        merge_note=MERGE_NOTE,
        identity_at_init=False,
        identity_note=IDENTITY_NOTE,
        needs=f"{CHECKPOINTING} Of an encoder-decoder only the decoder's self-attention gets a prefix, as in peft; "
        "`everywhere: true` adds those of encoder and cross-attention.",
        supports=frozenset({"4bit", "8bit", "resume"}),
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return the size of the prefixes, or of the networks that make them."""
        return sum(part.count for part in self._parts(model)) if self.config.everywhere else super().count(model)

    def notices(self, model: PreTrainedModel) -> list[str]:
        """Return how many positions are left, of which `everywhere` takes none."""
        return [] if self.config.everywhere else super().notices(model)

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Freeze the base and put prefixes before the keys and values of its layers.

        Raises:
            UsageError: The architecture takes no prefix, or has no encoder where one is to have prefixes.
        """
        if not self.config.everywhere:
            return super().apply(model, context)
        return _union.attach(model, context.recipe.model.task, self._parts(model))

    def export(self, model: Any) -> Any:
        """Return the prefixes without the networks that made them."""
        return _union.finished(model) if self.config.everywhere else super().export(model)

    def _parts(self, model: PreTrainedModel) -> list[_union.Part]:
        from peftctl.models.attentions import attentions

        if not model.config.is_encoder_decoder:
            raise UsageError(
                f"method.everywhere: only for an encoder-decoder; the {model.config.model_type} architecture has a "
                "prefix in every layer without it; remove it"
            )
        width: int = model.config.get_text_config().hidden_size
        return _union.prefixes(attentions(model), self.config, width, self.config.init_std)

    def start(self, prefix: TrainedPrefix, model: PreTrainedModel, context: base.Context) -> None:
        """Start from the activations of a text; without weights there are none."""
        from peftctl.tuners.prefix import as_rows, keys_and_values

        text = self.config.init_text
        if text is None:
            return
        if model.config.is_encoder_decoder:
            raise UsageError("method.init_text: only for causal_lm: a decoder's activations depend on what is encoded")
        if model.device.type == "meta":
            return
        prefix.start_from(as_rows(keys_and_values(model, self._ids(text, context.tokenizer))))

    def _ids(self, text: str, tokenizer: Any) -> list[int]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UsageError("method.init_text: has no token; write some words of the task, or remove it")
        n = self.config.num_virtual_tokens
        return (ids * -(-n // len(ids)))[:n]
