"""FAR: Efficient Fine-Tuning of BERT Models on the Edge, Vucetic et al. 2022 (https://arxiv.org/abs/2205.01541).

    a_j = Σ_i |W_ji - W0_ji|        how far node j of a feed-forward layer has moved, after a short priming
    y = P [W_learn x ; W_frozen x] + b,   W_learn: the ⌈ρ d_out⌉ nodes of the largest a_j

In two stages: `priming` trains all nodes of the feed-forward layers, for a small share of the run; `main` begins anew
and trains the learners alone, with their entries of the bias. Attention is frozen in both, a classifier's head trains.
(not verified: whether the paper trains attention, and whether it keeps the primed weights; `keep_priming` keeps those
of the learners)

The paper splits a layer into two, since autograd can't leave out a part of a tensor, and puts the outputs in order
with a permutation P. Here W stays whole and frozen, and the learners are a tensor of their own that is added to their
outputs: y[learners] += Δ x + β. So as there, frozen nodes have no gradient and no state in the optimizer. It costs one
product of ⌈ρ d_out⌉ rows more in the forward pass than the split does. Priming, too, trains changes beside W.

A node is an output of one linear layer (`unit: output_row`, the paper's). In blocks of today's decoders the neuron in
the middle is the natural one: `unit: inner_neuron` takes row j of the layers that read the stream (gate and up) and
column j of the one that writes it (down) together, and a_j sums over all three.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from peftctl.errors import RunError, UsageError
from peftctl.methods import _targets, base
from peftctl.methods._rows import Layer, RowMethod, highest, linear_layers
from peftctl.methods._shares import RunShare, exact, two_stages
from peftctl.recipe.schema import Recipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Config(base.MethodConfig):
    """The `method:` section of FAR."""

    name: Literal["far"] = "far"
    retention: Annotated[float, Field(gt=0, le=1)] = 0.1
    """ρ: share of the nodes that are learners, rounded up in every layer."""
    priming: RunShare = 0.05
    """Share of the run's steps that train all nodes, to score them; one step at least."""
    unit: Literal["output_row", "inner_neuron"] = "output_row"
    """What a node is: an output of a linear layer, or a neuron between the layers of a feed-forward part."""
    scope: Literal["layer", "model"] = "layer"
    """Rank the nodes of each layer apart, or those of all layers together, where layers with more inputs score higher.
    With `model` the layers' shares are found out, so that the number announced is that of equal shares."""
    keep_priming: bool = False
    """Learners go on from where priming has brought them, and so does a head. Left out, they begin anew."""


class Method(RowMethod):
    """The nodes of the feed-forward layers that move most."""

    Config = Config
    card = base.Card(
        title="FAR",
        paper="Vucetic et al. 2022, arXiv 2205.01541",
        category="selective",
        summary="A short priming finds the nodes of the feed-forward layers that move most; then only they train.",
        trains="a change of the chosen rows of the feed-forward layers and of their biases; a classifier's head",
        count="Σ over the feed-forward layers of ceil(ρ * d_out) * (d_in + 1), or * d_in without biases, plus the head",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        mergeable=True,
        needs="Priming, which holds changes, gradients and optimizer state of all feed-forward layers.",
        supports=frozenset({"gradient_checkpointing", "resume"}),
    )

    def stages(self, recipe: Recipe) -> Sequence[base.Stage]:
        """Return priming and the run itself."""
        return two_stages(recipe, "priming", self.config.priming, "priming")

    def notices(self, model: PreTrainedModel) -> Sequence[str]:
        """Say what priming trains."""
        all_nodes = sum(layer.size * layer.parameters for layer in self._layers(model).values())
        return [
            f"far: {all_nodes:,} parameters train in the first {self.config.priming:.0%} of the run, to score the nodes"
        ]

    def enter(self, model: Any, stage: base.Stage, batches: base.Batches) -> None:
        """Let all nodes train; before the main stage choose the learners, and begin anew."""
        from peftctl.backends import processes
        from peftctl.tuners.row_delta import begin_anew, place

        if stage.name == "priming":
            self._take_all(model)
            return
        place(model, processes.from_first(self._learners(model)))
        if not self.config.keep_priming:
            begin_anew(model)

    def _learners(self, model: Any) -> dict[str, torch.Tensor]:
        """Return name of a layer -> its learners."""
        parts = _parts(self._sizes, model.peft_config["default"].columns if self._inner else ())
        scores = node_scores(model, parts)
        if not any(score.any() for score in scores.values()):
            raise RunError("far: priming has moved no node; raise method.priming, or shorten the warm-up")
        counts = {part: self._learner_count(len(score)) for part, score in scores.items()}
        if self.config.scope == "model":
            chosen = highest(scores, sum(counts.values()))
        else:
            chosen = {part: highest({part: score}, counts[part])[part] for part, score in scores.items()}
        return {name: rows for part, rows in chosen.items() for name in parts[part]}

    @property
    def _inner(self) -> bool:
        return self.config.unit == "inner_neuron"

    def _learner_count(self, nodes: int) -> int:
        return math.ceil(exact(self.config.retention) * nodes)

    def _layers(self, model: PreTrainedModel) -> dict[str, Layer]:
        from peftctl.models.sublayers import feed_forwards

        chosen = linear_layers(model, "mlp", self.config.name)
        ends = feed_forwards(model, _targets.matched_modules(model, "all-linear")) if self._inner else {}
        biased = {name: getattr(module, "bias", None) is not None for name, module in chosen.items()}
        layers = {
            name: Layer(module, name in ends, biased[name] and name not in ends) for name, module in chosen.items()
        }
        for part, names in _parts(layers, ends).items():
            if len({layers[name].size for name in names}) > 1:
                raise UsageError(
                    f"method.unit: the layers before {part} have another number of outputs than it has inputs; "
                    "take output_row"
                )
        return layers

    def _counts(self, layers: Mapping[str, Layer]) -> dict[str, int]:
        return {name: self._learner_count(layer.size) for name, layer in layers.items()}


def _parts(names: Iterable[str], ends: Iterable[str]) -> dict[str, list[str]]:
    """Return which layers share their nodes: the last one of a feed-forward part -> all, or each layer -> itself.

    Args:
        names: Of the feed-forward layers, in the model's order.
        ends: The last ones of the parts; none where each layer has nodes of its own.
    """
    last, parts, part = set(ends), {}, []
    for name in names:
        part.append(name)
        if name in last or not last:
            parts[name], part = part, []
    return parts


def node_scores(model: Any, parts: Mapping[str, Sequence[str]]) -> dict[str, torch.Tensor]:
    """Return part -> a: (nodes,) float32, the summed absolute changes of the weights of every node.

    Args:
        model: After priming, with all nodes of every layer.
        parts: Name of a part -> its layers, all with the same nodes.
    """
    from peftctl.tuners.row_delta import layers

    found = dict(layers(model))
    moved = {name: layer.delta_weight["default"].detach().abs().sum(dim=1) for name, layer in found.items()}
    return {part: sum(moved[name] for name in names) for part, names in parts.items()}  # type: ignore[misc]
