"""Side blocks cut out of the base's: the rows and columns that matter most, those that belong together kept together.

    score of a unit = sum of the scores of all weights in its rows and columns
    stream: d / r of the d dimensions, the same in every block; feed-forward: of each block its own d_ff / r units;
    attention: of each block groups of heads that share keys and values, in each group as many heads as the side has
    for one, in each head as many dimensions

The score of a weight is its magnitude, or its Fisher information: the mean over rows of its squared gradient. Only the
sums of a matrix's scores over its rows and columns are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peftctl.errors import RunError
from peftctl.models.supervised import supervised_forward
from peftctl.tuners.ladder import LadderEnd
from peftctl.tuners.ladder_axes import Axes, BlockAxes, Part, unknown, values_of
from peftctl.tuners.ladder_stack import narrow_config

Sums = Mapping[str, Sequence[torch.Tensor]]
"""Name of a parameter in its block -> for each of its axes the scores added up over the others."""


def fill(model: Any, scores: Mapping[int, Sums] | None = None) -> None:
    """Copy what is kept of the base's blocks and of its final norm into the side, in place.

    Args:
        model: A PeftModel with one side network.
        scores: Block of the base -> scores, as `fisher` returns them; None takes magnitudes.

    Raises:
        UsageError: What the axes of the architecture's weights count is not known.
    """
    base, end = model.get_base_model(), the_end(model)
    side: Any = end.ladder_side["default"]
    config = base.config.get_text_config()
    narrow = narrow_config(base, end.stack, config.hidden_size // side.down.out_features)
    kinds, blocks = BlockAxes(base, end.stack), end.stack.block_list(base)
    axes = {i: kinds.of(blocks[i], config) for i in side.layers}
    scores = scores or {i: {n: axis_sums(w.abs()) for n, w in values_of(blocks[i]).items()} for i in side.layers}
    every = [units(axes[i], scores[i])["stream"] for i in side.layers]
    stream = largest(torch.stack(every).sum(0), narrow.hidden_size)
    with torch.no_grad():
        for i, rung in zip(side.layers, side.rungs, strict=True):
            values, small = values_of(blocks[i]), kinds.of(rung.block, narrow)
            sizes = {part.role: len(part.places) for parts in small.values() for axis in parts for part in axis}
            kept = {"stream": stream, **choose(units(axes[i], scores[i]), sizes, config, narrow)}
            for name, p in rung.block.named_parameters():
                cut = _cut(values[name], axes[i][name], small[name], kept)
                if cut.shape != p.shape:
                    raise unknown(config)
                p.copy_(cut)
        for name, p in side.norm.named_parameters():
            p.copy_(end.get_base_layer().get_parameter(name)[stream.to(p.device)])


def the_end(model: nn.Module) -> LadderEnd:
    """Return the layer with the side network of a model."""
    return next(module for module in model.modules() if isinstance(module, LadderEnd))


def axis_sums(scores: torch.Tensor) -> list[torch.Tensor]:
    """Return for each axis of a matrix or vector its scores summed over the others, in float32 on the CPU."""
    wide = scores.float()
    return [(wide.sum(1 - axis) if wide.ndim == 2 else wide).cpu() for axis in range(wide.ndim)]


def units(axes: Axes, sums: Sums) -> dict[str, torch.Tensor]:
    """Return role -> the score of each of its units in a block."""
    found: dict[str, torch.Tensor] = {}
    for name, its_sums in sums.items():
        for parts, along in zip(axes[name], its_sums, strict=True):
            for part in parts:
                found[part.role] = found.get(part.role, 0) + along[part.places]  # type: ignore[operator]
    return found


def choose(
    scores: Mapping[str, torch.Tensor], sizes: Mapping[str, int], wide: Any, narrow: Any
) -> dict[str, torch.Tensor]:
    """Return role -> the units of a block that are kept, for all roles but the stream.

    Args:
        scores: Of the base's block, as `units` returns them.
        sizes: Role -> how many units the side's block has.
        wide: The base's configuration.
        narrow: The side's.
    """
    p, small = (len(scores["q"]) // wide.num_attention_heads, sizes["q"] // narrow.num_attention_heads)
    q, k, v, o = (scores[role].reshape(-1, p) for role in "qkvo")
    groups, share = len(k), len(q) // len(k)
    wanted, each = sizes["k"] // small, sizes["q"] // sizes["k"]
    of_group = (k + v).sum(1) + (q + o).sum(1).reshape(groups, share).sum(1)
    kept: dict[str, list[torch.Tensor]] = {role: [] for role in "qkvo"}
    for group in _cyclic(largest(of_group, wanted), wanted):
        heads = torch.arange(share) + group * share
        best = _cyclic(heads[largest((q + o)[heads].sum(1), each)], each)
        in_keys = largest(q[heads].sum(0) + k[group], small)
        in_values = largest(o[heads].sum(0) + v[group], small)
        kept["k"].append(group * p + in_keys)
        kept["v"].append(group * p + in_values)
        kept["q"] += [head * p + in_keys for head in best]
        kept["o"] += [head * p + in_values for head in best]
    return {"inner": largest(scores["inner"], sizes["inner"]), **{role: torch.cat(kept[role]) for role in "qkvo"}}


def largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the ascending indices of the largest scores, at most all of them; of equals the first."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def fisher(model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> dict[int, Sums]:
    """Return for each block of the base that has a rung the Fisher information, summed along each axis.

    Args:
        model: With a new side network, in any mode, which it keeps.
        batches: One row each, on the CPU.

    Raises:
        RunError: There is no row, or a gradient is not finite.
    """
    end = the_end(model)
    side: Any = end.ladder_side["default"]
    blocks = end.stack.block_list(model.get_base_model())
    sums = {i: {n: axis_sums(torch.zeros_like(w)) for n, w in blocks[i].named_parameters()} for i in side.layers}
    rows = 0
    with _base_alone(model), _squares({w: sums[i][n] for i in sums for n, w in blocks[i].named_parameters()}):
        for batch in batches:
            on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
            supervised_forward(model, on_device).cross_entropy().backward()
            rows += 1
    if not rows:
        raise RunError("ladder_side_tuning: there is no training row to score the blocks on")
    for i, name, along in ((i, n, t) for i, block in sums.items() for n, found in block.items() for t in found):
        along.div_(rows)
        if not torch.isfinite(along).all():
            raise RunError(
                f"ladder_side_tuning: a gradient of block {i}'s {name} is not finite; set model.dtype to bfloat16 or "
                "float32"
            )
    return sums  # type: ignore[return-value]


@contextmanager
def _base_alone(model: Any) -> Iterator[None]:
    """Run the base without the side and without dropout; afterwards all is as it was."""
    training, trained = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval()
    try:
        with model.disable_adapter():
            for p in trained:
                p.requires_grad_(False)
            yield
    finally:
        for p in trained:
            p.requires_grad_(True)
        model.train(training)


@contextmanager
def _squares(weights: Mapping[nn.Parameter, Sequence[torch.Tensor]]) -> Iterator[None]:
    """Let weights have gradients; add the sums of their squares to these tensors, and free each as it is complete."""

    def add(weight: nn.Parameter) -> None:
        assert weight.grad is not None
        for total, found in zip(weights[weight], axis_sums(weight.grad.float().square()), strict=True):
            total.add_(found)
        weight.grad = None

    hooks = [weight.requires_grad_(True).register_post_accumulate_grad_hook(add) for weight in weights]  # type: ignore
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for weight in weights:
            weight.requires_grad_(False)


def _cut(
    value: torch.Tensor,
    wide: Sequence[Sequence[Part]],
    small: Sequence[Sequence[Part]],
    kept: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """Return the kept rows and columns, each where the side's block has it."""
    for axis, (before, after) in enumerate(zip(wide, small, strict=True)):
        source = torch.cat([p.places if p.role == "whole" else p.places[kept[p.role]] for p in before])
        value = value.index_select(axis, source[torch.cat([p.places for p in after]).argsort()].to(value.device))
    return value


def _cyclic(found: torch.Tensor, count: int) -> list[int]:
    """Return so many of the found, from the first again where they are too few."""
    return [int(found[i % len(found)]) for i in range(count)]
