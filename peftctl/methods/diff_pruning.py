"""DiffPruning: Parameter-Efficient Transfer Learning with Diff Pruning, Guo et al. 2021 (https://arxiv.org/abs/2012.07463).

    gates:  W_eff = W + z ⊙ w,   loss = CE + λ E|z|_0,   E|z|_0 = Σ σ(α - log(-L/R))
    main:   W_eff = W + δ,       δ: the k entries of the largest |z w| of all chosen weights, floor(keep * P) of them

z are hard-concrete gates, one for each weight: see tuners/gated_delta.py. w begins with 0, α with 5, where a gate is
open with a probability of 0.993. `structured` adds a gate for every weight matrix. Two stages: `gates` trains w and α;
then the mask is fixed, δ begins as z w with the gates of eval mode, and `main` trains δ. A classifier's head trains in
both, whole and without penalty.

The authors' λ of 1.25e-7 is for BERT-large and a sum over its weights: here it is scaled by 335,141,888 / P, so that
all gates together weigh the same in any model. u is drawn once for an optimizer step, so that accumulation, several
processes and recomputed activations change nothing; the authors draw at every forward pass. Gradients of w and α are
clipped by their common norm, not apart as there. `train.learning_rate` is that of w and of δ, where the authors have
1e-5 and 5e-5.
(not verified: whether the authors' scripts use structured gates in their main results)

The first stage needs more memory than full fine-tuning: w and α, their gradients and two moments of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from peftctl.errors import RunError, UsageError
from peftctl.methods import _groups, _heads, base
from peftctl.methods._lora import TASK_TYPES
from peftctl.methods._masks import read_counts, read_mask
from peftctl.methods._rows import linear_layers
from peftctl.methods._shares import RunShare, exact, spread, two_stages
from peftctl.methods.fishmask import largest
from peftctl.recipe.schema import Recipe, TrainSection

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from peftctl.models.supervised import Supervised

BERT_LARGE = 335_141_888
"""Parameters of the model that the authors' λ is for."""
_BYTES = 32
"""Of w and α, of their gradients and of two moments of each, in float32, for one weight."""


class Config(base.MethodConfig):
    """The `method:` section of DiffPruning."""

    name: Literal["diff_pruning"] = "diff_pruning"
    keep: Annotated[float, Field(gt=0, le=1)] = 0.005
    """Share of the chosen weights that have a change in the end."""
    penalty: Annotated[float, Field(ge=0)] = 1.25e-7
    """λ for a model of BERT-large's size; scaled to this one's."""
    alpha_learning_rate: Annotated[float, Field(gt=0)] = 0.1
    """Of α. That of w is `train.learning_rate`."""
    structured: bool = False
    """One more gate for each weight matrix."""
    gates: RunShare = 0.5
    """Share of the run's steps that the first stage gets, one step at least."""
    mask_from: str | None = None
    """A finished run of diff_pruning, or of fishmask, whose mask is taken in place of the first stage; `keep` is that
    run's then, and δ begins with 0."""
    target_modules: str | list[str] = "all-linear"
    """Linear layers whose weights are chosen: name suffixes, a regular expression, or `all-linear`, `attention`,
    `mlp`. Embeddings and the output head are no part of `all-linear`."""


class Method(base.Method):
    """A sparse change, whose places are learned."""

    Config = Config
    loss_reads_weights = True
    card = base.Card(
        title="DiffPruning",
        paper="Guo et al. 2021, arXiv 2012.07463",
        category="selective",
        summary="A change of all weights behind gates finds which entries matter; the largest are kept and trained on.",
        trains="a change of k entries of the linear layers' weights, before that w and α of all; a classifier's head",
        count="k = keep * P rounded down, P the weights of the chosen layers, plus the head; in the first stage 2P",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        mergeable=True,
        needs="The first stage needs more memory than full fine-tuning: 32 bytes for each chosen weight.",
        supports=frozenset({"gradient_checkpointing", "resume"}),
    )

    def inputs(self) -> Mapping[str, Sequence[str]]:
        """Return the run whose mask is taken."""
        return {} if self.config.mask_from is None else {"method.mask_from": [self.config.mask_from]}

    def count(self, model: PreTrainedModel) -> int:
        """Return k, plus a new head."""
        return sum(self._counts(self._chosen(model)).values()) + _heads.head_parameters(model)

    def notices(self, model: PreTrainedModel) -> Sequence[str]:
        """Say what the first stage takes."""
        if self.config.mask_from is not None:
            return ()
        weights = sum(_size(module) for module in self._chosen(model).values())
        share = f"{self.config.gates:.0%}"
        return [
            f"diff_pruning: {2 * weights:,} parameters train in the first {share} of the run, which takes "
            f"{_BYTES * weights / 1e9:.2g} GB beside the model: more than full fine-tuning"
        ]

    def stages(self, recipe: Recipe) -> Sequence[base.Stage]:
        """Return the training of the gates, unless there is a mask, and that of what they keep."""
        if self.config.mask_from is not None:
            return (base.Stage(),)
        return two_stages(recipe, "gates", self.config.gates, "gates")

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Attach k values, spread evenly over the layers until it is known where they belong."""
        from peft import get_peft_model

        from peftctl.tuners.float32_copy import widen_copies
        from peftctl.tuners.sparse_delta import SparseDeltaConfig

        self.stages(context.recipe)  # refuses lengths that do not fit before weights load
        self._seed = context.recipe.train.seed
        chosen = self._chosen(model)
        self._names = list(chosen)
        self._penalty = self.config.penalty * BERT_LARGE / sum(_size(module) for module in chosen.values())
        config = SparseDeltaConfig(
            task_type=TASK_TYPES[context.recipe.model.task],
            counts=self._counts(chosen),
            modules_to_save=_heads.unknown_to_peft(model) or None,
        )
        # Without weights peft would make the copy of a head on the CPU all the same.
        with model.device if model.device.type == "meta" else nullcontext():
            peft_model = get_peft_model(model, config)
        widen_copies(peft_model)
        return peft_model

    def calibrate(self, model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Take the mask of an earlier run."""
        from peftctl.tuners.gated_delta import place_anywhere

        if self.config.mask_from is not None:
            place_anywhere(model, read_mask(self.config.mask_from))

    def enter(self, model: Any, stage: base.Stage, batches: base.Batches) -> None:
        """Attach gates to all weights; before the main stage keep the largest k of what came through."""
        from peftctl.backends import processes
        from peftctl.tuners.gated_delta import into_gated, into_sparse, layers

        if stage.name == "gates":
            into_gated(model, self._names, self.config.structured, self._seed)
        elif self.config.mask_from is None:
            scores = {name: layer.kept().abs_() for name, layer in layers(model)}
            k = self._kept(sum(score.numel() for score in scores.values()))
            into_sparse(model, processes.from_first(projected(scores, k)))

    def param_groups(self, model: Any, train: TrainSection) -> list[dict[str, Any]]:
        """Return what decays, changes and values, then α with its rate, then a head's parameters, as usual."""
        from peftctl.tuners import gated_delta, sparse_delta

        gated = [layer for _, layer in gated_delta.layers(model)]
        alphas = [p for layer in gated for p in (layer.alpha, layer.alpha_group) if p is not None]
        changes = [layer.change for layer in gated]
        changes += [layer.delta_values["default"] for _, layer in sparse_delta.layers(model)]
        _, head = _groups.apart(model, [*alphas, *changes])
        groups = [{"params": changes, "weight_decay": train.weight_decay}]
        if alphas:
            groups.append({"params": alphas, "weight_decay": 0.0, "lr": self.config.alpha_learning_rate})
        return [*groups, *_groups.by_decay(head, train)]

    def loss(
        self, model: Any, batch: Mapping[str, torch.Tensor], forward: Callable[..., Supervised]
    ) -> dict[str, torch.Tensor]:
        """Return the cross-entropy and, while there are gates, λ E|z|_0."""
        from peftctl.tuners.gated_delta import layers

        parts = super().loss(model, batch, forward)
        expected = [layer.expected_open() for _, layer in layers(model)]
        if expected and self._penalty:
            parts["l0"] = self._penalty * sum(expected)
        return parts

    def callbacks(self, model: Any) -> Sequence[base.Callback]:
        """Return what tells the gates the step."""
        return (_Steps(sum(p.numel() for p in model.parameters() if p.requires_grad)),)

    def state_dict(self, model: Any) -> dict[str, Any]:
        """Return the mask, or that there is none yet."""
        from peftctl.tuners import gated_delta, sparse_delta

        if any(True for _ in gated_delta.layers(model)):
            return {"mask": None}
        return {"mask": {name: layer.delta_indices["default"].cpu() for name, layer in sparse_delta.layers(model)}}

    def load_state_dict(self, model: Any, state: Mapping[str, Any]) -> None:
        """Restore the gates, or the mask and with it how many values each layer has."""
        from peftctl.tuners.gated_delta import into_gated, place_anywhere

        if state["mask"] is None:
            into_gated(model, self._names, self.config.structured, self._seed)
        else:
            place_anywhere(model, state["mask"])

    def export(self, model: Any) -> Any:
        """Return the adapter, with a head in the base's type: so peft loads it again."""
        from peftctl.tuners.float32_copy import narrow_copies

        narrow_copies(model)
        return model

    def _chosen(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        return linear_layers(model, self.config.target_modules, self.config.name)

    def _counts(self, chosen: Mapping[str, nn.Module]) -> dict[str, int]:
        sizes = {name: _size(module) for name, module in chosen.items()}
        if self.config.mask_from is not None:
            return read_counts(self.config.mask_from, sizes)
        return {name: k for name, k in spread(self._kept(sum(sizes.values())), sizes).items() if k}

    def _kept(self, weights: int) -> int:
        kept = int(exact(self.config.keep) * weights)
        if not kept:
            raise UsageError(f"method.keep: {self.config.keep} of {weights:,} weights is none; raise it")
        return kept


class _Steps(base.Callback):
    """Tells the gates the step that they draw for, and metrics.jsonl what trains."""

    def __init__(self, parameters: int):
        self.parameters = parameters

    def stage_begins(self, info: base.StepInfo) -> None:
        """Set the first step, also after a resume."""
        info.log["trainable_parameters"] = self.parameters
        self.after_step(info)

    def after_step(self, info: base.StepInfo) -> None:
        """Set the next one."""
        from peftctl.tuners.gated_delta import layers

        for _, layer in layers(info.model):
            layer.step = info.step


def _size(module: nn.Module) -> int:
    return module.get_parameter("weight").numel()


def projected(scores: Mapping[str, torch.Tensor], k: int) -> dict[str, torch.Tensor]:
    """Return name -> ascending indices of the entries that are among the k largest of all; of equals the first.

    Args:
        scores: |z w| of every layer, float32.
        k: At most as many as there are entries.

    Raises:
        RunError: They are all 0, or one is not finite.
    """
    import torch

    if not all(torch.isfinite(score).all() for score in scores.values()):
        raise RunError("diff_pruning: a change is not finite: training has diverged; lower train.learning_rate")
    if not any(score.any() for score in scores.values()):
        raise RunError("diff_pruning: no change came through its gate; raise method.gates, or lower method.penalty")
    return largest(scores, k)
