"""MoV: Pushing Mixture of Experts to the Limit, Zadouri et al., ICLR 2024 (https://arxiv.org/abs/2309.05444).

    z <- z * Σ_e p_e l_e,   p = softmax(R z),   l_e: (d,), R: (E, d) without bias

for the z that (IA)^3 scales too: keys and values, (batch, seq, kv), and what the last layer of a feed-forward part
reads, (batch, seq, f). Every z has vectors and a router of its own, and the router reads z itself. Vectors start at 1,
so the model starts as the base. R starts from N(0, 0.02^2); as long as all vectors are equal it has no gradient.

Every token has all E vectors: with the k largest p alone, whose sum is below 1, the start would not be the base. The
router reads keys and values across all heads (not verified: the authors' has a kernel for each head). Weight decay
pulls towards 0, which erases activations: the vectors never get any.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from peftctl.methods import _groups, _heads, _routed, _targets, base
from peftctl.methods.ia3 import chosen
from peftctl.recipe.schema import Positive, TrainSection

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


class Config(base.AdapterConfig):
    """The `method:` section of MoV."""

    name: Literal["mov"] = "mov"
    experts: Positive = 10
    """E."""


class Method(_routed.RoutedMethod):
    """A dense mixture of (IA)^3 vectors."""

    config: Config
    Config = Config
    card = base.Card(
        title="MoV",
        paper="Zadouri et al. 2024, arXiv 2309.05444",
        category="adapter",
        summary="Several (IA)^3 vectors for keys, values and feed-forward activations; a router weighs them, token by "
        "token.",
        trains="E vectors l and the router of every activation that is scaled; a classifier's head",
        count="L * 2E * (2kv + f), kv for each attention of a block, plus the head",
        tasks=_routed.TASKS,
        merge_note=_routed.MERGE_NOTE,
        needs="Projections of their own for k and v: an architecture that fuses them with q is refused.",
        supports=_routed.SUPPORTS,
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return 2 E d over the activations, and a classifier's head."""
        scaled, read = chosen(model)
        outputs = sum(_targets.in_out_features(module)[1] for module in scaled.values())
        inputs = sum(_targets.in_out_features(module)[0] for module in read.values())
        return 2 * self.config.experts * (outputs + inputs) + _heads.head_parameters(model)

    def param_groups(self, model: Any, train: TrainSection) -> list[dict[str, Any]]:
        """Return the vectors, without weight decay, and routers and a classifier's head with the recipe's."""
        from peftctl.tuners.routed_vectors import VectorExperts

        experts = [module for module in model.modules() if isinstance(module, VectorExperts)]
        vectors, others = _groups.apart(model, (module.vectors for module in experts))
        return [{"params": vectors, "weight_decay": 0.0}, *_groups.by_decay(others, train)]

    def _tuner(self, model: PreTrainedModel) -> PeftConfig:
        from peftctl.tuners.routed_vectors import RoutedVectorsConfig

        scaled, read = chosen(model)
        return RoutedVectorsConfig(
            experts=self.config.experts,
            feedforward=list(read),
            target_modules=_targets.suffixes(model, [*scaled, *read]),
        )
