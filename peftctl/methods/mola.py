"""MoLA: Higher Layers Need More LoRA Experts, Gao et al. 2024 (https://arxiv.org/abs/2402.08562).

    y = W x + (alpha / r) Σ_{e in top k} p'_e B_e A_e x,   p = softmax(R x),   p' = the k largest of p over their sum
    A_e: (r, d_in), B_e: (d_out, r), R: (E_l, d_in) without bias; E_l experts in every target of block l

A and R start Kaiming-uniform, U(-1/sqrt(d_in), 1/sqrt(d_in)), and B at 0, so the model starts as the base exactly.

The blocks are divided into bands of equal depth, one for each entry of `allocation`: with n entries, block l of L,
counted from 0, is in band floor(n l / L). Where n does not divide L, the bands so differ by one block, and where L < n
some have none: 30 blocks in 4 bands are 8, 7, 8 and 7. An encoder and a decoder are divided each on its own, and a
target outside of blocks has what the last band has. `inverted_triangle` is the first version's best, 2 4 6 8; its title
is about it. The second version (NAACL 2025) finds that the middle needs most: `middle_heavy` is 2 8 8 2 here, with as
many experts in all (not verified: its numbers).

The balancing loss, off by default as in the authors' code, is that of Switch Transformers (Fedus et al. 2021), summed
over the targets:  load_balance * E Σ_e f_e P_e,  f_e the share of e in what tokens chose, which sums to 1 over the
experts, and P_e the mean of p_e, over the tokens of a micro-batch without padding; 1 where all is even.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from peftctl.methods import _routed, base
from peftctl.recipe.schema import Positive

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

ALLOCATIONS = {"inverted_triangle": [2, 4, 6, 8], "middle_heavy": [2, 8, 8, 2]}
"""Name -> experts of every band, from the first block on."""


class Config(_routed.RoutedKeys):
    """The `method:` section of MoLA."""

    name: Literal["mola"] = "mola"
    r: Positive = 8
    """Rank of every expert."""
    allocation: Literal["inverted_triangle", "middle_heavy"] | Annotated[list[Positive], Field(min_length=1)] = (
        "inverted_triangle"
    )
    """Experts by depth: a name, or a list with one number for each band of equal depth, e.g. `[5]` for 5 everywhere."""
    k: Annotated[int, Field(ge=2)] = 2
    """How many experts a token has; of a single one the weight would be 1 whatever the router says."""
    load_balance: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the balancing loss; the authors' code has 1e-3 where it is on."""

    @model_validator(mode="after")
    def _enough(self) -> Config:
        fewest = min(bands(self))
        if fewest < self.k:
            raise ValueError(
                f"allocation: expected at least k = {self.k} experts in every band, got {fewest}; add some"
            )
        return self


class Method(_routed.RoutedLoraMethod):
    """Top-k mixtures of LoRA experts, with more experts where the model is deeper."""

    config: Config
    Config = Config
    card = base.Card(
        title="MoLA",
        paper="Gao et al. 2024, arXiv 2402.08562",
        category="lora",
        summary="LoRA experts of which every token takes two; how many there are depends on the depth of the block.",
        trains="A and B of every expert, and the router, of every target; a classifier's head",
        count=_routed.COUNT + ", where E is that of the block",
        tasks=_routed.TASKS,
        merge_note=_routed.MERGE_NOTE,
        supports=_routed.SUPPORTS,
    )
    renormalise: ClassVar[bool] = True

    @property
    def k(self) -> int:
        """How many experts a token has."""
        return self.config.k

    def experts(self, model: PreTrainedModel, names: Sequence[str]) -> Mapping[str, int]:
        """Return the experts of the band that every target is in."""
        per_band = bands(self.config)
        found = {}
        for name in names:
            block = _routed.block_of(name)
            depth = _depth(model, block[0]) if block else 1
            found[name] = per_band[len(per_band) * block[1] // depth] if block else per_band[-1]
        return found

    def notices(self, model: PreTrainedModel) -> list[str]:
        """Return the experts of every block."""
        of_block = {}
        for name, experts in self.experts(model, list(self._chosen(model))).items():
            of_block[_routed.block_of(name)] = experts
        return [f"experts from the first block on: {' '.join(map(str, of_block.values()))}"]

    def routing_losses(
        self, routed: Sequence[_routed.Routed], batch: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return the balancing loss, where it is on."""
        if not self.config.load_balance:
            return {}
        return {"load_balance": self.config.load_balance * sum(map(switch_balance, routed))}  # type: ignore[dict-item]


def bands(config: Config) -> list[int]:
    """Return the experts of every band, from the first block on."""
    return ALLOCATIONS[config.allocation] if isinstance(config.allocation, str) else config.allocation


def switch_balance(layer: _routed.Routed) -> torch.Tensor:
    """Return the scalar E Σ_e f_e P_e of one layer; gradients reach P only."""
    weights = layer.mask.flatten()
    f, p = weights @ layer.chosen().flatten(0, 1), weights @ layer.probabilities.flatten(0, 1)
    shares = f / f.sum().clamp(min=1), p / weights.sum().clamp(min=1)
    return len(f) * (shares[0] @ shares[1])


def _depth(model: nn.Module, stack: str) -> int:
    return len(model.get_submodule(stack))  # type: ignore[arg-type]
