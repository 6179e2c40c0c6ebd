"""COLA: Chain of LoRA, Xia, Qin and Hazan 2024 (https://arxiv.org/abs/2401.04151).

    W_j = W_{j-1} + s B_j A_j,   j = 1 .. M,   A_j: (r_j, d_in), B_j: (d_out, r_j), s = alpha / r

M links, one after another, each trained as a LoRA of its own: A is drawn anew, B is zero, the optimizer knows nothing,
and the learning rate runs through its whole schedule, warm-up included. In between the trained pair is frozen ("tie the
knot"). The sum of the links has rank up to r_1 + ... + r_M. One link is LoRA, bit for bit.

    steps of a link = ceil(total / M); the last one may be shorter, and a run of fewer than M (M - 1) steps may have
    fewer links

Links differ from ReLoRA's cycles by being few and long, each with a schedule to its end. They follow one another in one
pass through the data: the M links together see as many rows as one LoRA, as the paper compares them.

Unlike the paper we don't add s B_j A_j into W: finished links stay beside it, so a base of a half type or of 4 bits
loses nothing by rounding, and the result is an ordinary LoRA on the original base. All links have the scale alpha / r,
r that of the first, whatever their own rank. A later link of a lower rank trains in the first one's tensors, of which
the other rows of A and columns of B are zero, with zero gradients: they stay so. Not verified: that the paper's chains
have two or three links of rank 8, and how it lowers ranks.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from peftctl.methods import base
from peftctl.methods._restart import RestartKeys, RestartMethod
from peftctl.methods.lora import Method as Lora
from peftctl.recipe.schema import Positive


class Config(RestartKeys):
    """The `method:` section of a chain of LoRA."""

    name: Literal["chain_of_lora"] = "chain_of_lora"
    links: Positive = 2
    """LoRAs that train one after another, for equally many steps; 1 is plain LoRA."""
    ranks: list[Positive] = Field(default_factory=list)
    """Rank of every link, never rising, the first equal to `r`; empty is `r` for all."""

    @field_validator("ranks")
    @classmethod
    def _one_a_link(cls, value: list[int], info: ValidationInfo) -> list[int]:
        if not value or not {"links", "r", "rank_pattern"} <= info.data.keys():  # another key has its own error
            return value
        if info.data["rank_pattern"]:
            raise ValueError("expected no rank_pattern beside it: a link has one rank for all targets; leave one out")
        links, r = info.data["links"], info.data["r"]
        if len(value) != links or value[0] != r or any(after > before for before, after in pairwise(value)):
            raise ValueError(
                f"expected one rank a link ({links}), the first equal to r ({r}) and none above the one before, got "
                f"{value}; change it, links or r"
            )
        return value


class Method(RestartMethod):
    """LoRAs one after another, whose sum is the update."""

    Config = Config
    config: Any
    card = base.Card(
        title="Chain of LoRA (COLA)",
        paper="Xia, Qin and Hazan 2024, arXiv 2401.04151",
        category="lora",
        summary="LoRAs trained one after another, each on top of those before: the sum has a higher rank than each.",
        trains="A and B of every target, once a link",
        count=Lora.card.count + ". What is saved has the sum of the links' ranks",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        mergeable=True,
        needs="Memory and time for the frozen pairs: every finished link adds r * (d_in + d_out) float32 a target.",
        supports=Lora.card.supports,
    )
    forgets_all = True

    def cycle(self, total_steps: int) -> int:
        """Return the steps of a link."""
        return -(-total_steps // self.config.links)

    def schedule_steps(self, total_steps: int) -> int:
        """Return the steps of a link: each has a schedule of its own."""
        return self.cycle(total_steps)

    def rank(self, restarts: int) -> int | None:
        """Return the rank of the link after so many restarts."""
        return self.config.ranks[restarts] if self.config.ranks else None
