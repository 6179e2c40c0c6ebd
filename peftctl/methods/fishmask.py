"""FISH Mask: Training Neural Networks with Fixed Sparse Masks, Sung et al. 2021 (https://arxiv.org/abs/2111.09839).

    F_i = 1/N Σ_n (∂ log p(y_n | x_n) / ∂w_i)^2       over N training rows, with the rows' own answers
    W_eff = W + Δ,   Δ_i trains where F_i is among the k largest of all chosen weights, and is 0 elsewhere

The scores are made once, before the first step: without dropout, one row a backward pass, since the square of a
batch's mean gradient is another thing. The mask never changes afterwards.

Where we differ from the authors' code: Δ is a parameter of its own and W stays as it was, so that the optimizer's state
has k entries, and weight decay pulls Δ to 0, W_eff to W, not to 0. k is `keep` times the chosen weights, not times all
parameters. A new head trains besides, as there, but is no part of k. The N rows are drawn by `train.seed`.

Scores take 4 bytes for every chosen weight while they are made. Gradients are squared and freed weight by weight.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from peftctl.errors import RunError, UsageError
from peftctl.methods import _groups, _heads, _targets, base
from peftctl.methods._lora import TASK_TYPES
from peftctl.recipe.schema import Positive, TrainSection

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


class Config(base.MethodConfig):
    """The `method:` section of FISH masks."""

    name: Literal["fishmask"] = "fishmask"
    keep: Annotated[float, Field(gt=0, le=1)] = 0.005
    """Share of the chosen weights that train."""
    rows: Positive = 128
    """N: training rows that are scored, at most all of them."""
    target_modules: str | list[str] = "all-linear"
    """Linear layers whose weights are chosen: name suffixes, a regular expression, or `all-linear`, `attention`,
    `mlp`. Embeddings and the output head are no part of `all-linear`."""
    as_shira: bool = False
    """Save the result as peft's own SHIRA, which plain peft loads. It pads every layer to the fullest one's share, so
    the file is many times larger."""


class Method(base.Method):
    """The entries of the weights with the largest Fisher information."""

    Config = Config
    card = base.Card(
        title="FISH Mask",
        paper="Sung et al. 2021, arXiv 2111.09839",
        category="selective",
        summary="The few weights with the largest Fisher information on the training rows train, all else is frozen.",
        trains="a change of k entries of the linear layers' weights; a classifier's head",
        count="k = keep * weights of the chosen layers, rounded down, plus the head",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        mergeable=True,
        supports=frozenset({"gradient_checkpointing", "resume"}),
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return k, plus a new head."""
        return self._kept(self._chosen(model)) + _heads.head_parameters(model)

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Attach k values, spread evenly over the layers until `calibrate` places them."""
        from peft import get_peft_model

        from peftctl.tuners.float32_copy import widen_copies
        from peftctl.tuners.sparse_delta import SparseDeltaConfig

        chosen = self._chosen(model)
        config = SparseDeltaConfig(
            task_type=TASK_TYPES[context.recipe.model.task],
            counts=_spread(self._kept(chosen), {name: m.get_parameter("weight").numel() for name, m in chosen.items()}),
            modules_to_save=_heads.unknown_to_peft(model) or None,
        )
        # Without weights peft would make the copy of a head on the CPU all the same.
        with model.device if model.device.type == "meta" else nullcontext():
            peft_model = get_peft_model(model, config)
        widen_copies(peft_model)
        return peft_model

    def calibrate(self, model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Score the weights on the first N rows and fix the mask."""
        from peftctl.tuners.sparse_delta import layers, place

        k = sum(layer.delta_values["default"].numel() for _, layer in layers(model))
        place(model, largest(fisher(model, islice(batches, self.config.rows)), k))
        if self.config.as_shira:
            _refuse_without_shira(model)  # rather than after the training

    def param_groups(self, model: Any, train: TrainSection) -> list[dict[str, Any]]:
        """Return the values, which decay though they are vectors, and a head's parameters, as usual."""
        from peftctl.tuners.sparse_delta import layers

        values, head = _groups.apart(model, (layer.delta_values["default"] for _, layer in layers(model)))
        return [{"params": values, "weight_decay": train.weight_decay}, *_groups.by_decay(head, train)]

    def state_dict(self, model: Any) -> dict[str, Any]:
        """Return the mask."""
        from peftctl.tuners.sparse_delta import layers

        return {"mask": {name: layer.delta_indices["default"].cpu() for name, layer in layers(model)}}

    def load_state_dict(self, model: Any, state: Mapping[str, Any]) -> None:
        """Restore the mask, and with it how many values each layer has."""
        from peftctl.tuners.sparse_delta import place

        place(model, state["mask"])

    def export(self, model: Any) -> Any:
        """Return the adapter in the type that the section wants, with a head in the base's: so peft loads it again."""
        from peftctl.tuners.float32_copy import narrow_copies
        from peftctl.tuners.shira_export import into_shira

        narrow_copies(model)
        return into_shira(model) if self.config.as_shira else model

    def _chosen(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        from torch import nn

        chosen = _targets.matched_modules(model, self.config.target_modules)
        for head in _heads.head_names(model):  # trains whole
            chosen = {name: m for name, m in chosen.items() if name != head and not name.startswith(f"{head}.")}
        for name, module in chosen.items():
            if isinstance(module, nn.Embedding):
                raise UsageError(f"method.target_modules: {name} is an embedding; fishmask takes linear layers only")
        return chosen

    def _kept(self, chosen: Mapping[str, nn.Module]) -> int:
        weights = sum(module.get_parameter("weight").numel() for module in chosen.values())
        kept = int(self.config.keep * weights)
        if not kept:
            raise UsageError(f"method.keep: {self.config.keep} of {weights:,} weights is none; raise it")
        return kept


def _refuse_without_shira(model: Any) -> None:
    from peftctl.tuners.shira_export import shira_rank

    try:
        shira_rank(model)
    except ValueError as error:
        raise UsageError(f"method.as_shira: SHIRA can't hold this mask: {error}; remove it") from error


def fisher(model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return F: name of a target in the base model -> float32 scores, of its weight's shape.

    Args:
        model: With fresh values, in any mode, which it keeps.
        batches: One row each, on the CPU.

    Raises:
        RunError: There is no row, or a gradient is not finite.
    """
    import torch

    from peftctl.models.supervised import supervised_forward
    from peftctl.tuners.sparse_delta import layers

    weights = {name: layer.get_base_layer().get_parameter("weight") for name, layer in layers(model)}
    scores = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    training, rows = model.training, 0
    model.eval()
    for p in trained:
        p.requires_grad_(False)
    hooks = [_squares_into(scores[name], weight.requires_grad_(True)) for name, weight in weights.items()]
    try:
        with model.disable_adapter():
            for batch in batches:
                on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
                supervised_forward(model, on_device).cross_entropy().backward()
                rows += 1
    finally:
        for hook in hooks:
            hook.remove()
        for weight in weights.values():
            weight.requires_grad_(False)
        for p in trained:
            p.requires_grad_(True)
        model.train(training)
    if not rows:
        raise RunError("fishmask: there is no training row to score the weights on")
    for name, score in scores.items():
        score.div_(rows)
        if not torch.isfinite(score).all():
            raise RunError(f"fishmask: a gradient of {name} is not finite; set model.dtype to bfloat16 or float32")
    return scores


def largest(scores: Mapping[str, torch.Tensor], k: int) -> dict[str, torch.Tensor]:
    """Return name -> ascending indices of the entries that are among the k largest of all; of equals the first.

    Args:
        scores: Non-negative float32 tensors of any shapes.
        k: At most as many as there are scores.

    Returns:
        Exactly k indices in all; names without any are left out.
    """
    threshold, equals = _kth_largest(scores.values(), k)
    found = {}
    for name, score in scores.items():
        flat = score.flatten()
        chosen = flat > threshold
        ties = (flat == threshold).nonzero()[:equals, 0]
        equals -= len(ties)
        chosen[ties] = True
        if chosen.any():
            found[name] = chosen.nonzero()[:, 0]
    return found


def _kth_largest(scores: Collection[torch.Tensor], k: int) -> tuple[torch.Tensor, int]:
    """Return the k-th largest of all scores, and how many that equal it are among the k largest.

    Sorting needs several times the memory of the scores. But the bits of non-negative floats are ordered as integers
    are: one pass counts them by their upper half, another by their lower half where the upper is the k-th largest's.
    """
    import torch

    bits = [score.flatten().view(torch.int32) for score in scores]
    upper, k = _bucket(torch.stack([torch.bincount(b >> 16, minlength=1 << 16) for b in bits]).sum(0), k)
    low = [b[(b >> 16) == upper] & 0xFFFF for b in bits]
    lower, k = _bucket(torch.stack([torch.bincount(b, minlength=1 << 16) for b in low]).sum(0), k)
    return torch.tensor((upper << 16) | lower, dtype=torch.int32, device=bits[0].device).view(torch.float32), k


def _bucket(counts: torch.Tensor, k: int) -> tuple[int, int]:
    """Return in which bucket the k-th largest is, and the how many-th largest it is there."""
    at_least = counts.flip(0).cumsum(0).flip(0)
    bucket = int((at_least >= k).sum()) - 1
    return bucket, k - int(at_least[bucket] - counts[bucket])


def _squares_into(score: torch.Tensor, weight: torch.Tensor) -> Any:
    """Add the square of every gradient of a weight to its scores, and free it as soon as it is complete."""

    def add(weight: torch.Tensor) -> None:
        assert weight.grad is not None
        gradient = weight.grad.float()
        score.addcmul_(gradient, gradient)
        weight.grad = None

    return weight.register_post_accumulate_grad_hook(add)


def _spread(k: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Share k out in proportion to sizes, so that the parts add up to k."""
    total, before, parts = sum(sizes.values()), 0, {}
    for name, size in sizes.items():
        parts[name] = k * (before + size) // total - k * before // total
        before += size
    return parts
