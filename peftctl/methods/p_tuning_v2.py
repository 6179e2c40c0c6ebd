"""P-tuning v2, Liu et al. 2022 (https://arxiv.org/abs/2110.07602): prefix tuning for understanding, with a task head.

In every layer, n trained keys and values stand before those of the text, as in `prefix_tuning`:

    head(x) = softmax(q [P_k; K]^T / sqrt(d_h)) [P_v; V],   [P_k; P_v] = dropout(E),   E: (n, 2 L h_kv d_h)

The table E is trained directly, N(0, 1) at first, with the head of the classifier, which is new and random; the base is
frozen. The head reads what it reads without a prefix: the state of the real first token for a class of the text, and
one state a token for tags, because a prefix adds keys and values but no position to the output.

Where we, or peft, differ from the paper:
- Dropout on the prefix is the authors' (their head's, 0.1 in BERT); peft has none, so ours is around its table.
- On BERT the text begins at position n, as in the authors' code: rows may be n tokens shorter.
- The paper's optional first stage, one prefix over several data sets with a head each, is not here yet.
- peft's `disable_adapter` fails on an encoder's classifier behind a prefix, and the trained head would stay anyway.
"""

from __future__ import annotations

from typing import Literal

from peftctl.methods import base
from peftctl.methods._prefix import CHECKPOINTING, IDENTITY_NOTE, MERGE_NOTE, PrefixKeys, PrefixMethod


class Config(PrefixKeys):
    """The `method:` section of P-tuning v2."""

    name: Literal["p_tuning_v2"] = "p_tuning_v2"


class Method(PrefixMethod):
    """A table of keys and values before every layer's own, and the head of the task."""

    Config = Config
    card = base.Card(
        title="P-tuning v2",
        paper="Liu et al. 2022, arXiv 2110.07602",
        category="prompt",
        summary="Prefixes in every layer and a new head: classes of texts and of words at the level of fine-tuning.",
        trains="the prefix and the head; the base is frozen",
        count="n * 2L*kv + head",
        tasks=("seq_cls", "token_cls"),
        merge_note=MERGE_NOTE,
        identity_at_init=False,
        identity_note=IDENTITY_NOTE,
        disable_note="peft can't switch off a prefix before an encoder's classifier, and the head is trained with it",
        needs=f"{CHECKPOINTING} Encoders whose attention reads a cache: BERT, RoBERTa, ELECTRA, not DeBERTa.",
        supports=frozenset({"resume", "4bit"}),
    )
