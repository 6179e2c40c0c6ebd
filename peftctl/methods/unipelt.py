"""UniPELT, Mao et al. 2021, ACL 2022 (https://arxiv.org/abs/2110.07577).

A Unified Framework for Parameter-Efficient Language Model Tuning.

Every block has a prefix, LoRA on queries and values, and an adapter at its end, each behind a gate of its own, g in
(0, 1), that reads what the part reads:

    prefix:   softmax(q [g P_k; K]^T / sqrt(d_h)) [g P_v; V]
    LoRA:     W_q x + g B A x, W_v x + g' B' A' x, with g in the place of alpha / r, which is not there
    adapter:  y + g (U φ(D y + b1) + b2), at the end of the block as `pfeiffer`'s exact one

In the paper, whose models are BERTs, a gate is one number a row, g(x) = mean over positions t of σ(w . x_t + b). In an
encoder it is here too, over the real positions; the authors' code takes padding in (`gate_mask: false`).

In a decoder that mean would show every position what comes behind it, and would change with every generated token.
There the gate is per token, g_t = σ(w . x_t + b): the scores of the prefix are g_t q_t . P_k, its values g_t P_v. What
is at t does not depend on later tokens, and generation with a cache equals that without. Cross-attention is the
decoder's.

Where we differ further:
- The prefix is made by a network in every layer, W2 tanh(W1 E + b1) + b2, in the authors' code by one over all layers.
- Prefix keys have no position, and the text begins at position 0.
- D, U and the adapter's gate start as N(0, init_std^2), cut off at two deviations, which the authors don't.
- Where queries and values come out of one layer with the keys, as GPT-2's, one pair of factors serves all.

Not verified: the paper's learning rate, usually given as 5e-4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from peftctl.errors import UsageError
from peftctl.methods import _targets, base
from peftctl.methods._union import IDENTITY_NOTE, MERGE_NOTE, Part, UnionKeys, UnionMethod, bottlenecks, prefixes
from peftctl.recipe.schema import Positive

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel


class Config(UnionKeys):
    """The `method:` section of UniPELT."""

    name: Literal["unipelt"] = "unipelt"
    num_virtual_tokens: Positive = 10
    """Keys and values before those of the text in every attention layer."""
    projection: bool = True
    """Train a small network in every layer that makes its keys and values; only what it makes is saved."""
    r: Positive = 8
    """Rank of the updates of queries and values."""
    target_modules: str | list[str] | None = None
    """Linear layers with LoRA: name suffixes or a regular expression; left out, peft's choice for the architecture."""
    bottleneck: Positive = 48
    """m: width of the bottleneck."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of D, U and the adapter's gate at first."""
    gate_mask: bool = True
    """In encoders, leave padding out of the mean that a gate is."""


class Method(UnionMethod):
    """Gated prefix, gated LoRA and gated adapter in every block."""

    Config = Config
    config: Any
    card = base.Card(
        title="UniPELT",
        paper="Mao et al. 2021, arXiv 2110.07577",
        category="hybrid",
        summary="A prefix, LoRA on queries and values, and an adapter in every block, each behind a learned gate.",
        trains="the prefix or its networks, A and B, D and U, the gates' w and b; a classifier's head",
        count="per attention layer n*2kv (projection: n*kv + (kv+1)p + (p+1)2kv) + d+1; per LoRA target "
        "r(d_in + d_out) + d_in+1; per block 2dm + m + d + d+1; plus the head",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        merge_note=f"{MERGE_NOTE}; the gates depend on the input, LoRA's too",
        identity_at_init=False,
        identity_note=IDENTITY_NOTE,
        supports=frozenset({"4bit", "8bit", "gradient_checkpointing", "resume"}),
    )

    def members(self, model: PreTrainedModel, task: str) -> list[Part]:
        """Return prefixes, factors and adapters, those of encoders apart, whose gates differ.

        Raises:
            UsageError: It is not known where the architecture attends or where its blocks end, or a target is no linear
                layer.
        """
        from peftctl.methods._bottleneck import around
        from peftctl.models.attentions import attentions

        found = attentions(model)
        encoders = tuple(f"{layer.stack}." for layer in found if layer.kind == "encoder")

        def gate(std: float | None) -> Callable[[str], Mapping[str, Any]]:
            whole = "mean" if self.config.gate_mask else "all"
            return lambda name: {"over": whole if name.startswith(encoders) else "token", "std": std}

        width: int = model.config.get_text_config().hidden_size
        std = self.config.init_std
        deviations = {"init_std": std, "up_std": std}
        return [
            *prefixes(found, self.config, width, self.config.prefix_std, gate(None)),
            *self._factors(model, gate(None)),
            *bottlenecks(around(model), self.config, deviations, gate(std)),
        ]

    def _factors(self, model: PreTrainedModel, gate: Callable[[str], Mapping[str, Any]]) -> list[Part]:
        """Return low-rank factors for queries and values: a part for those of one kind of gate."""
        from torch import nn

        r = self.config.r
        groups: dict[str, dict[str, tuple[int, int]]] = {}
        targets = _targets.resolve_targets(model, self.config.target_modules)
        for name, module in _targets.matched_modules(model, targets).items():
            if isinstance(module, nn.Embedding):
                raise UsageError(f"method.target_modules: {name} is an embedding; unipelt takes linear layers only")
            groups.setdefault(gate(name)["over"], {})[name] = _targets.in_out_features(module)
        return [
            Part(
                "low_rank",
                list(widths),
                {"r": r},
                sum(r * (d_in + d_out) for d_in, d_out in widths.values()),
                gates={name: d_in for name, (d_in, _) in widths.items()},
                gate=gate(next(iter(widths))),
            )
            for widths in groups.values()
        ]
