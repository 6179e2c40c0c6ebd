"""MAM adapter, mix and match: He et al. 2021, ICLR 2022 (https://arxiv.org/abs/2110.04366).

Towards a Unified View of Parameter-Efficient Transfer Learning.

The paper finds that a short prefix uses its parameters best in attention, and a scaled parallel adapter beside the
feed-forward part, and puts both into every block:

    attention:     softmax(q [P_k; K]^T / sqrt(d_h)) [P_v; V],   P_k, P_v: (n, d_h) a head
    feed-forward:  FFN(x) + s (U φ(D x + b1) + b2),   D: (m, d), b1: (m,), U: (d, m), b2: (d,), x: what the FFN reads

D is drawn Kaiming-uniformly and U, b1, b2 are 0, as in the authors' code, so that the adapter starts as nothing; the
prefix does not. s is fixed: 4 where text is generated, 2 where it is classified. An encoder-decoder has prefixes of its
own in the encoder, in the decoder and in cross-attention.

Where we differ:
- The authors' models are post-norm. Where the norm comes first x is the normed input, as the FFN's own first layer
  reads it; the authors' code for such models does the same.
- The authors make the prefix by a network over all layers (mid dimension 800). Here the table itself trains, and
  `projection` gives every layer a network of its own; the kept part is the same.
- Prefix keys have no position, and the text begins at position 0: peft's prefix takes the first n positions.

Not verified: a learned s, which the paper tries too, starts at 1; it is not offered here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from peftctl.methods import base
from peftctl.methods._union import IDENTITY_NOTE, MERGE_NOTE, Part, UnionKeys, UnionMethod, bottlenecks, prefixes
from peftctl.recipe.schema import CLASSIFICATION, Positive

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Config(UnionKeys):
    """The `method:` section of the MAM adapter."""

    name: Literal["mam"] = "mam"
    hidden: Positive = 800
    """Width of the network of `projection`."""
    bottleneck: Positive = 512
    """m: width of the bottleneck."""
    scaling: Annotated[float, Field(ge=0)] | None = None
    """s: what the adapter's change is multiplied by; left out, 4 for language models and 2 for classifiers."""


class Method(UnionMethod):
    """A prefix in every attention layer, a parallel adapter beside every feed-forward part."""

    Config = Config
    config: Any
    card = base.Card(
        title="MAM adapter",
        paper="He et al. 2021, arXiv 2110.04366",
        category="hybrid",
        summary="A short prefix in every attention layer and a scaled adapter beside every feed-forward part.",
        trains="the prefix; D, U and biases of the adapters; a classifier's head",
        count="n * 2L*kv + L * (2dm + m + d), plus the head; an encoder-decoder has 3 attention layers for 2 parts",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        merge_note=MERGE_NOTE,
        identity_at_init=False,
        identity_note=IDENTITY_NOTE,
        supports=frozenset({"4bit", "8bit", "gradient_checkpointing", "resume"}),
    )

    def members(self, model: PreTrainedModel, task: str) -> list[Part]:
        """Return prefixes and adapters.

        Raises:
            UsageError: It is not known where the architecture attends, or where its feed-forward parts are.
        """
        from peftctl.methods._bottleneck import beside
        from peftctl.models.attentions import attentions

        scaling = self.config.scaling
        if scaling is None:
            scaling = 2.0 if task in CLASSIFICATION else 4.0
        width: int = model.config.get_text_config().hidden_size
        adapters = bottlenecks(beside(model), self.config, {"init_std": None, "up_std": 0.0, "scaling": scaling})
        return [*prefixes(attentions(model), self.config, width, self.config.prefix_std), *adapters]
