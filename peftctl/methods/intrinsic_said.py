"""Intrinsic SAID: structure-aware intrinsic dimension, Aghajanyan et al. 2021 (https://arxiv.org/abs/2012.13255).

    said:   θ_i = θ_0,i + λ_g(i) P_i z,   z: (d - m,), 0 at first; λ: (m,), 1 at first
    did:    θ_i = θ_0,i + P_i z,          z: (d,)

One vector z of a few hundred or thousand entries moves all matrices of the model: P_i: (D_i, len z) is a random
Fastfood projection of matrix i (`tuners/fastfood_projection.py`), drawn from `projection_seed` and never saved. λ has
an entry for every block that has targets, and one for all targets outside of the blocks, if there are any. So d numbers
train, whatever the model's size, and the result is d numbers and a seed.

θ is the weights of linear layers here, all of them but the output head by default; the paper projects every tensor. A
transform of the embedding of a 135M-parameter model has 2^25 entries, more than all layers of a block together; with it
m would be the blocks + 1, as the paper has it. A classifier's new head trains whole beside z and is not counted in d;
not verified: the paper counts it in d or trains it so. Not verified either: its learning rates, said to be one to two
orders above those of full fine-tuning.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

from peftctl.errors import UsageError
from peftctl.methods import _heads, _targets, base
from peftctl.methods._lora import TASK_TYPES
from peftctl.recipe.schema import Count, Positive

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class Config(base.AdapterConfig):
    """The `method:` section of intrinsic SAID."""

    name: Literal["intrinsic_said"] = "intrinsic_said"
    d: Positive = 1000
    """Intrinsic dimension: entries of z and λ together."""
    variant: Literal["said", "did"] = "said"
    """With a scale for every block, or without."""
    projection_seed: Count = 0
    """What the projections are drawn from; another seed is another subspace."""
    target_modules: str | list[str] = "all-linear"
    """Linear layers that z moves: name suffixes, a regular expression, or `all-linear`, `attention`, `mlp`."""


class Method(base.Method):
    """A random subspace of d dimensions."""

    Config = Config
    card = base.Card(
        title="Intrinsic SAID",
        paper="Aghajanyan et al. 2021, arXiv 2012.13255",
        category="selective",
        summary="One vector of d entries moves all linear layers through fixed random projections; only it is saved.",
        trains="z and a scale for every block; a classifier's head",
        count="d, whatever the size of the model; plus a classifier's head",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        mergeable=True,
        needs=(
            "6 bytes beside each entry of the targets, their count rounded up to a power of two, layer by layer, for "
            "the projections; in every step two transforms of them, and all updates whole in the activations' type."
        ),
        supports=frozenset({"4bit", "8bit", "gradient_checkpointing", "resume"}),
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return d, and a classifier's head."""
        self._groups(self._chosen(model))
        return self.config.d + _heads.head_parameters(model)

    def notices(self, model: PreTrainedModel) -> list[str]:
        """Return what the projections take."""
        from peftctl.tuners.fastfood_projection import power_of_two

        sides = [_targets.in_out_features(module) for module in self._chosen(model).values()]
        entries = [power_of_two(d_in * d_out) for d_in, d_out in sides]
        return [f"projections: {len(entries)} matrices, {6 * sum(entries) / 2**20:,.0f} MiB beside the model"]

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Draw the projections and start from z = 0, where the model is the base."""
        from peft import get_peft_model

        from peftctl.tuners.fastfood import FastfoodConfig
        from peftctl.tuners.fastfood_projection import draw, fingerprint
        from peftctl.tuners.float32_copy import widen_copies

        chosen, seed = self._chosen(model), self.config.projection_seed
        groups = self._groups(chosen)
        d_in, d_out = _targets.in_out_features(next(iter(chosen.values())))
        config = FastfoodConfig(
            task_type=TASK_TYPES[context.recipe.model.task],
            d=self.config.d,
            projection_seed=seed,
            order=list(chosen),
            groups=groups,
            modules_to_save=_heads.unknown_to_peft(model) or None,
        )
        config.check = fingerprint(draw(seed, 0, d_in * d_out, config.d - config.scales))
        with model.device if model.device.type == "meta" else nullcontext():
            peft_model = get_peft_model(model, config)
        widen_copies(peft_model)
        return peft_model

    def export(self, model: Any) -> Any:
        """Return the adapter, with a classifier's head in the base's type, as peft loads it."""
        from peftctl.tuners.float32_copy import narrow_copies

        narrow_copies(model)
        return model

    def _groups(self, names: dict[str, nn.Module]) -> list[int]:
        """Return which entry of λ scales each target; nothing without λ.

        Raises:
            UsageError: λ would leave nothing of d for z.
        """
        if self.config.variant == "did":
            return []
        blocks = [_block(name) for name in names]
        order = [*dict.fromkeys(block for block in blocks if block), ""]  # what is outside of blocks comes last
        groups = [order.index(block) for block in blocks]
        m = len(set(groups))
        if self.config.d <= m:
            raise UsageError(
                f"method.d: expected more than {m}, one scale a block, got {self.config.d}; or variant did"
            )
        return groups

    def _chosen(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        from torch import nn

        heads = tuple(f"{name}." for name in _heads.head_names(model))
        matched = _targets.matched_modules(model, self.config.target_modules)
        chosen = {name: module for name, module in matched.items() if not f"{name}.".startswith(heads)}
        if not chosen:
            raise UsageError("method.target_modules: holds only the head, which trains whole; name layers of the model")
        for name, module in chosen.items():
            if isinstance(module, nn.Embedding):
                raise UsageError(
                    f"method.target_modules: {name} is an embedding; intrinsic_said takes linear layers only"
                )
        return chosen


def _block(name: str) -> str:
    """Return the block that a module lies in, e.g. `model.layers.3`; nothing where it is outside of blocks."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if number is None else ".".join(parts[: number + 1])
