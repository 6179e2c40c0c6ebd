"""LoRA-drop: pruning LoRA by its output, Zhou et al. 2024 (https://arxiv.org/abs/2402.07721).

    g_l = mean over tokens of |s B_l A_l x_l|^2,   I_l = g_l / sum_k g_k

A layer whose adapter adds little to its output does not need one of its own. In three stages:

    sample     LoRA everywhere, for a short while, on a part of the training rows
    measure    layers sorted by I, descending: the shortest prefix whose I add up to `threshold` is kept
    main       all begins anew: kept layers have an A and B of their own, all others share one pair; all rows

Sizes are compared among the layers of one kind, e.g. all q_proj, of equal shape: the sum above is over them. Outputs of
different modules differ in size for reasons of their own (a value projection of 192 outputs, an up projection of 1536),
so one ranking of all would drop whole kinds of modules. Every kind keeps one layer at least and has one shared pair at
most: sharing never crosses shapes, nor from an encoder to a decoder. The sample is stratified: every class, or else
every source, gives its part; it has 200 rows at least, where there are that many.
(not verified: that the paper ranks each kind apart, its share of the sample, and how long it trains on it)

g is measured in eval mode on the rows of the sample, padding left out. Nothing of the first stage is kept but the
choice: A is drawn anew, B is zero, and a classifier's head, whole modules and rows of new tokens start again too. The
choice is in metrics.jsonl, in the first line of the stage `main`: `kept.LAYER` is a kept layer's I, and
`trainable_parameters` what trains from then on; the number that a run is announced with is that of the first stage.
What is saved is an ordinary LoRA with a copy of the shared pair in every layer that has it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from peftctl.errors import RunError, UsageError
from peftctl.methods import base
from peftctl.methods._lengths import in_steps
from peftctl.methods._lora import LoraKeys, LoraMethod, refuse_embeddings
from peftctl.methods._selection import Selection
from peftctl.methods.lora import Method as Lora
from peftctl.recipe.schema import OpenShare, Recipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from peftctl.data.encode import EncodedRow

LEAST_ROWS = 200
"""Rows that a sample has at least, where there are that many."""
_ROUNDING = 1e-9
"""Of a sum of shares."""


class Config(LoraKeys):
    """The `method:` section of LoRA-drop."""

    name: Literal["lora_drop"] = "lora_drop"
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.9
    """T: the layers that are kept make up this share of the summed sizes of all adapters' outputs; 1 keeps all."""
    sample: OpenShare = 0.1
    """Share of the training rows that the first stage trains on, at least 200 rows where there are that many."""
    sample_steps: Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Optimizer steps, or fraction of the run, of the first stage: a part of `train.max_steps` where that is given,
    else on top of `train.epochs`."""
    init: Literal["kaiming"] = "kaiming"
    """How A starts in both stages: Kaiming-uniform, U(-1/sqrt(d_in), 1/sqrt(d_in))."""

    @field_validator("init_from")
    @classmethod
    def _starts_anew(cls, value: str | None) -> str | None:
        if value is not None:
            raise ValueError(
                "this method begins anew after its first stage; name the finished adapter in model.adapters, which "
                "merges it first, or go on with lora"
            )
        return value


class Method(LoraMethod):
    """LoRA where its output is large, one shared pair elsewhere."""

    Config = Config
    config: Any
    card = base.Card(
        title="LoRA-drop",
        paper="Zhou et al. 2024, arXiv 2402.07721",
        category="lora",
        summary="Tries LoRA on a sample, keeps it where its output is large, and lets all other layers share one pair.",
        trains="A and B of the kept layers, and one pair for the others of each kind",
        count=Lora.card.count + ": this trains on the sample. Then, for each kind of module of equal shape, "
        "(kept layers + 1 for the others) * r * (d_in + d_out)",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        mergeable=True,
        needs="A short run on a sample before the run itself, and a forward pass over the sample.",
        supports=Lora.card.supports,
    )

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Attach an A and a B to every target."""
        self._seed = context.recipe.train.seed
        self.chosen: dict[str, float] = {}  # kept layer -> I, in its kind
        self._shared: list[list[str]] = []
        self.stages(context.recipe)  # refuses lengths that do not fit before weights load
        return super().apply(model, context)

    def stages(self, recipe: Recipe) -> Sequence[base.Stage]:
        """Return the run on the sample and the run itself.

        Raises:
            UsageError: `max_steps` has no step for the second.
        """
        length, whole = self.config.sample_steps, recipe.train.max_steps
        if whole is None:
            return self._sample(recipe.train.seed, length), base.Stage()
        first = max(1, in_steps(length, whole))
        if first >= whole:
            raise UsageError(
                f"method.sample_steps: {first} steps leave none of train.max_steps, {whole}, for the run itself; "
                "shorten it, or raise train.max_steps"
            )
        return self._sample(recipe.train.seed, first), base.Stage(steps=whole - first)

    def enter(self, model: Any, stage: base.Stage, batches: base.Batches) -> None:
        """Before the second stage, measure the adapters, choose, and begin anew."""
        import torch

        from peftctl.backends import processes
        from peftctl.tuners.shared_pairs import begin_anew, kinds, share

        if stage.name == "sample":
            return
        sizes = processes.from_first(output_sizes(model, batches(self._sample(self._seed))))
        for kind, names in kinds(model).items():
            shares = importance(kind, [sizes[name] for name in names])
            chosen = kept(shares, self.config.threshold)
            self.chosen |= {names[i]: shares[i] for i in chosen}
            others = [name for i, name in enumerate(names) if i not in chosen]
            self._shared += [others] if others else []
        share(model, self._shared)
        # A generator of its own: neither dropout nor the device decides where the run begins.
        begin_anew(model, torch.Generator().manual_seed(self._seed + 1))

    def callbacks(self, model: Any) -> Sequence[base.Callback]:
        """Return what says which layers are kept."""
        return (_Report(self),)

    def state_dict(self, model: Any) -> dict[str, Any]:
        """Return which layers have a pair of their own, and which share one."""
        return {"kept": self.chosen, "shared": self._shared}

    def load_state_dict(self, model: Any, state: Mapping[str, Any]) -> None:
        """Restore which layers share a pair."""
        from peftctl.tuners.shared_pairs import share

        self.chosen, self._shared = dict(state["kept"]), list(state["shared"])
        share(model, self._shared)

    def export(self, model: Any) -> Any:
        """Return an ordinary LoRA, with copies of the shared pairs."""
        from peftctl.tuners.shared_pairs import separate

        separate(model)
        return super().export(model)

    def _select(self, model: PreTrainedModel) -> Selection:
        return refuse_embeddings(super()._select(model), self.config.name)

    def _sample(self, seed: int, steps: int | float | None = None) -> base.Stage:
        return base.Stage("sample", steps, partial(stratified, share=self.config.sample, seed=seed))


class _Report(base.Callback):
    """Writes the choice to metrics.jsonl."""

    def __init__(self, method: Method):
        self.method = method

    def stage_begins(self, info: base.StepInfo) -> None:
        """Say which layers are kept, and what trains."""
        shares = self.method.chosen
        if shares:
            prefix = "base_model.model."
            info.log |= {f"kept.{name.removeprefix(prefix)}": share for name, share in shares.items()}
            info.log["kept"] = len(shares)
            info.log["trainable_parameters"] = sum(p.numel() for p in info.model.parameters() if p.requires_grad)


def stratified(rows: Sequence[EncodedRow], share: float, seed: int) -> Sequence[EncodedRow]:
    """Return a share of rows, at least 200 where there are that many, in their order.

    Every class (of rows of one class), else every source, gives its part, to the nearest row.

    Args:
        rows: All training rows.
        share: Of them.
        seed: Draws the rows.
    """
    strata: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        strata.setdefault(row.labels[0] if row.classes and len(row.labels) == 1 else row.source, []).append(i)
    draw = random.Random(f"sample {seed}")
    places = {}  # of a row among those of its kind, from 0 to 1: the lowest of all kinds make a sample in proportion
    for members in strata.values():
        for at, i in enumerate(draw.sample(members, len(members))):
            places[i] = (at + 0.5) / len(members)
    count = max(min(LEAST_ROWS, len(rows)), round(share * len(rows)))
    return [rows[i] for i in sorted(sorted(places, key=lambda i: (places[i], i))[:count])]


def output_sizes(model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> Mapping[str, float]:
    """Return name of a layer -> g, the mean over the tokens of all rows of |s B A x|^2.

    Args:
        model: In any mode, which it keeps.
        batches: One row each, on the CPU.
    """
    import torch

    from peftctl.models.supervised import supervised_forward
    from peftctl.tuners.shared_pairs import OutputSizes

    training = model.training
    model.eval()
    with torch.no_grad(), OutputSizes(model) as sizes:
        for batch in batches:
            row = unpadded(batch, model.config.is_encoder_decoder)
            supervised_forward(model, {name: tensor.to(model.device) for name, tensor in row.items()})
    model.train(training)
    return sizes.means()


def unpadded(batch: Mapping[str, torch.Tensor], paired: bool) -> dict[str, torch.Tensor]:
    """Return a batch of one row without the padding on its right.

    Args:
        batch: input_ids, attention_mask and labels, (1, seq), labels of a length of their own where paired.
        paired: Whether a decoder reads the labels.
    """
    tokens = int(batch["attention_mask"].sum())
    row = {name: tensor[:, :tokens] for name, tensor in batch.items()}
    if paired:
        labels = batch["labels"]
        row["labels"] = labels[:, : 1 + int((labels[0] >= 0).nonzero().max())]
    return row


def importance(kind: str, sizes: Sequence[float]) -> list[float]:
    """Return I: the sizes as shares of their sum.

    Raises:
        RunError: They are all zero, or one is not finite.
    """
    total = math.fsum(sizes)
    if not 0 < total < math.inf:
        raise RunError(
            f"lora_drop: on the sample the adapters of {kind} add {'nothing' if total == 0 else 'no finite number'}, "
            "so no layer can be chosen; raise method.sample_steps, shorten the warm-up, or leave these modules out of "
            "method.target_modules"
        )
    return [size / total for size in sizes]


def kept(shares: Sequence[float], threshold: float) -> set[int]:
    """Return the places of the largest shares, as few as add up to the threshold; of equals the first.

    Args:
        shares: Not negative, of sum 1.
        threshold: T, in (0, 1]; 1 keeps all that are not zero.
    """
    order = sorted((i for i, share in enumerate(shares) if share > 0), key=lambda i: -shares[i])
    if threshold == 1:
        return set(order)
    for count in range(1, len(order)):
        if math.fsum(shares[i] for i in order[:count]) >= threshold - _ROUNDING:
            return set(order[:count])
    return set(order)
