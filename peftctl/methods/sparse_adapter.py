"""SparseAdapter (He et al. 2022, https://arxiv.org/abs/2210.04284).

    A(h) = h + (M_U ⊙ U) φ((M_D ⊙ D) h + b1) + b2,   M fixed before the first step, Σ M = (1 - sparsity) * entries

Bottleneck adapters behind every sublayer, as Houlsby's, with frozen norms, of which only a part of the entries of D and
U trains; the others are 0 for good. Which part, is decided on the adapters as drawn, θ = D, U ~ N(0, init_std^2), by
the largest scores of all adapters together (`scope: global`) or of every matrix for itself (`scope: local`):

    snip       |g ⊙ θ|,   g the gradient of the cross-entropy over the first `rows` training rows (Lee et al. 2019)
    magnitude  |θ|
    random     a number drawn for each entry, by `train.seed`
    synflow    |θ ⊙ ∂R/∂θ|,   R the sum of what every adapter with |θ| makes of ones, as in the authors' code

`sparsity` is the share that is left out; in the authors' `prune_loop` the argument of that name is what stays. Biases
are no part of it: they all train. So four times m with a sparsity of 0.75 (Large-Sparse) has as many active weights as
m has, besides 3m biases more in each adapter. Only what stays has a parameter: neither weight decay nor momentum can
move the rest, and the optimizer's state is that of k values. The saved adapter is a plain one, with zeros in full.

Where we differ: the authors multiply by masks in the forward pass, which computes the same; D and U are cut off at two
deviations; a score that equals the threshold is kept or not so that the number is exact. U must not start at 0: every
score of SNIP and SynFlow would be 0. So the model does not start as the base exactly. GraSP is left out: its second
derivatives have no kernels in fast attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from peftctl.backends import processes
from peftctl.errors import RunError, UsageError
from peftctl.methods import _groups, _heads, base
from peftctl.methods._bottleneck import BottleneckKeys, BottleneckMethod, Chosen, behind
from peftctl.methods._shares import exact, spread
from peftctl.methods.fishmask import largest
from peftctl.recipe.schema import Positive, TrainSection

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_PARTS = ("the down-projection", "the up-projection")


class Config(BottleneckKeys):
    """The `method:` section of SparseAdapter."""

    name: Literal["sparse_adapter"] = "sparse_adapter"
    bottleneck: Positive = 256
    """m: width of the bottleneck, before entries are left out."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of D and U at first, before they are cut off at two of them."""
    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.75
    """Share of the entries of D and U that are left out."""
    score: Literal["snip", "magnitude", "random", "synflow"] = "snip"
    """What decides which entries stay."""
    scope: Literal["global", "local"] = "global"
    """Compare the scores of all adapters, or those of every matrix for itself."""
    rows: Positive = 64
    """Training rows that SNIP looks at, at most all of them."""
    target_modules: str | list[str] | None = None
    """Linear layers that an adapter follows: name suffixes, or a regular expression. Left out, the output projection
    of every sublayer."""

    @field_validator("init_from")
    @classmethod
    def _starts_anew(cls, value: str | None) -> str | None:
        if value is not None:
            raise ValueError("entries are chosen where the adapters start, not from trained ones; remove it")
        return value


class Method(BottleneckMethod):
    """Adapters with a part of their entries."""

    Config = Config
    config: Any
    card = base.Card(
        title="SparseAdapter",
        paper="He et al. 2022, arXiv 2210.04284",
        category="adapter",
        summary="Wide bottleneck adapters pruned before training: the entries with the largest scores train, the rest "
        "is 0.",
        trains="k entries of D and U, all biases of the adapters; a classifier's head",
        count="k + L * 2 * (m + d), k = (1 - sparsity) * L * 2 * 2dm rounded, three adapters a block for "
        "cross-attention, plus the head",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        merge_note="the adapter is not linear, no weight of the base can take it up",
        identity_at_init=False,
        identity_note="U starts like D, near zero: from zero, no entry would have a score",
        supports=frozenset({"4bit", "8bit", "gradient_checkpointing", "resume"}),
    )

    def __init__(self, config: Any):
        super().__init__(config)
        self.seed = 0

    def chosen(self, model: PreTrainedModel) -> Chosen:
        """Return what the sublayers end with, or the targets."""
        return behind(model, self.config.target_modules, "sparse_adapter")

    def settings(self, model: PreTrainedModel) -> Mapping[str, Any]:
        """Return the kind of adapter; U is drawn like D."""
        return {"kind": "sparse", "up_std": self.config.init_std}

    def count(self, model: PreTrainedModel) -> int:
        """Return k, plus the biases of all adapters, plus a new head."""
        m, widths = self.config.bottleneck, self.chosen(model).widths.values()
        return self._kept(sum(2 * d * m for d in widths)) + sum(m + d for d in widths) + _heads.head_parameters(model)

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Attach the adapters, with k entries that are spread evenly until `calibrate` chooses."""
        from peftctl.tuners.sparse_adapters import sparse_adapters

        self.seed = context.recipe.train.seed
        peft_model = super().apply(model, context)
        modules = dict(sparse_adapters(peft_model))
        sizes = {name: module.size for name, module in modules.items()}
        for name, k in spread(self._kept(sum(sizes.values())), sizes).items():
            modules[name].stand_in(k)
        return peft_model

    def calibrate(self, model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Score the entries and fix which of them train, the same ones in all processes."""
        from peftctl.tuners.sparse_adapters import place
        from peftctl.tuners.sparse_scores import scores

        found = scores(self.config.score, model, islice(batches, self.config.rows), self.seed)
        place(model, processes.from_first(self._choose(found)))

    def param_groups(self, model: Any, train: TrainSection) -> list[dict[str, Any]]:
        """Return the entries, which decay though they are vectors, and biases and a head's parameters, as usual."""
        from peftctl.tuners.sparse_adapters import sparse_adapters

        values, rest = _groups.apart(model, (module.values for _, module in sparse_adapters(model)))
        return [{"params": values, "weight_decay": train.weight_decay}, *_groups.by_decay(rest, train)]

    def state_dict(self, model: Any) -> dict[str, Any]:
        """Return which entries train."""
        from peftctl.tuners.sparse_adapters import sparse_adapters

        return {"kept": {name: module.indices.cpu() for name, module in sparse_adapters(model)}}

    def load_state_dict(self, model: Any, state: Mapping[str, Any]) -> None:
        """Restore which entries train, and with it how many values each adapter has."""
        from peftctl.tuners.sparse_adapters import place

        place(model, state["kept"])

    def export(self, model: Any) -> Any:
        """Return plain adapters with 0 in the places of entries that were left out."""
        from peftctl.tuners.into_plain import into_plain

        return into_plain(super().export(model))

    def _kept(self, entries: int) -> int:
        kept = round((1 - exact(self.config.sparsity)) * entries)
        if not kept:
            raise UsageError(f"method.sparsity: {self.config.sparsity} leaves none of {entries:,} entries; lower it")
        return kept

    def _choose(self, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the entries that stay, by the names of the layers that adapters follow.

        Args:
            found: Such a name -> the scores of its adapter, (2, dm): of D, and of U.

        Raises:
            RunError: Scores are not finite or all 0, or nothing of a matrix is left.
        """
        import torch

        kind = self.config.score
        for name, score in found.items():
            if not torch.isfinite(score).all():
                raise RunError(f"sparse_adapter: a {kind} score of {name} is not finite; set model.dtype to bfloat16")
        if not any(score.any() for score in found.values()):
            raise RunError(f"sparse_adapter: every {kind} score is 0; set method.score to magnitude")
        halves = {f"{part} behind {name}": score[i] for name, score in found.items() for i, part in enumerate(_PARTS)}
        k = self._kept(sum(half.numel() for half in halves.values()))
        if self.config.scope == "global":
            kept = largest(halves, k)
        else:
            parts = spread(k, {key: half.numel() for key, half in halves.items()})
            kept = {key: largest({key: halves[key]}, part)[key] for key, part in parts.items() if part}
        for key in halves.keys() - kept.keys():
            raise RunError(
                f"sparse_adapter: among the {k:,} entries that stay is none of {key}; lower method.sparsity, or set "
                "method.scope to local"
            )
        down, up = _PARTS
        return {
            name: torch.cat([kept[f"{down} behind {name}"], kept[f"{up} behind {name}"] + score.shape[1]])
            for name, score in found.items()
        }
