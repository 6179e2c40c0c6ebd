"""Turn base plus adapter into one plain model, layer by layer, and measure what rounding the result loses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftctl.errors import ArtifactError, UsageError


@dataclass
class Loss:
    """What rounding the merged weights to a type loses of the update BA.

    Args:
        layers: Layers folded.
        relative: |(merged - W) - BA| / |BA|, Frobenius over all layers; 0 where BA is 0.
        cosine: Between merged - W and BA over all layers; 1 where BA is 0.
    """

    layers: int
    relative: float
    cosine: float


def fold(model: Any, dtype: torch.dtype) -> tuple[Any, Loss]:
    """Fold every adapter layer of a PeftModel into its base and remove peft from the model.

    Args:
        model: A PeftModel in float32, so that W + BA is exact before it is rounded; it is consumed.
        dtype: What the result will be rounded to, by the caller.

    Returns:
        (the plain model, still float32; what rounding it will lose).

    Raises:
        UsageError: This type of adapter can't be merged.
        ArtifactError: A merged weight is not finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    kind = str.__str__(model.peft_config["default"].peft_type)  # of an enum the value, not its name
    if model.peft_config["default"].is_prompt_learning:
        raise UsageError(f"{kind}: a prompt can't be merged: it adds tokens, not weights")
    if not hasattr(type(model.base_model), "unload"):
        raise UsageError(f"{kind}: adapters of this type can't be merged")
    plain = model.get_base_model()
    tied = _untie(plain)
    tally = _Tally(dtype)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            _merge_layer(module, tally, kind)
    merged = model.base_model.unload()
    if tied:
        _tie_again(merged)
    return merged, tally.result()


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round all that a checkpoint stores to a type, kept in float32; tables made by code, as RoPE's, stay exact."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))


class _Tally:
    """Sums over layers, in float64."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.layers = 0
        self.error = self.exact = self.kept = self.product = 0.0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Count one weight: W and W + BA."""
        update = (after - before).double()
        kept = after.to(self.dtype).double() - before.double()
        self.error += float((kept - update).square().sum())
        self.exact += float(update.square().sum())
        self.kept += float(kept.square().sum())
        self.product += float((kept * update).sum())

    def result(self) -> Loss:
        if self.exact == 0.0:
            return Loss(self.layers, 0.0, 1.0)
        cosine = self.product / math.sqrt(self.exact * self.kept) if self.kept else 0.0
        return Loss(self.layers, math.sqrt(self.error / self.exact), cosine)


def _merge_layer(layer: Any, tally: _Tally, kind: str) -> None:
    """Merge one layer in place; refuse what is not finite."""
    base = layer.get_base_layer()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    try:
        layer.merge(safe_merge=True)
    except (NotImplementedError, AttributeError) as error:
        raise UsageError(f"{kind}: adapters of this type can't be merged") from error
    except ValueError as error:  # peft found NaN
        raise ArtifactError(f"merge refused: {error}; nothing was written") from error
    for name, parameter in base.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ArtifactError(f"merge refused: {name} of a merged layer is not finite; nothing was written")
        tally.add(before[name], parameter.detach())
    tally.layers += 1


def _untie(model: nn.Module) -> bool:
    """Give the output head a weight of its own where an adapter changes it or the input embedding.

    Both names otherwise stand for one tensor: an update of the head would change the input too.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    adapted = BaseTunerLayer | AuxiliaryTrainingWrapper
    if head is None or not (isinstance(head, adapted) or isinstance(embedding, adapted)):
        return False
    inner, source = _innermost(head), _innermost(embedding)
    if inner.weight is not source.weight:
        return False
    inner.weight = nn.Parameter(source.weight.detach().clone(), requires_grad=False)
    return True


def _innermost(module: Any) -> Any:
    while True:
        if hasattr(module, "original_module"):
            module = module.original_module
        elif hasattr(module, "base_layer"):
            module = module.base_layer
        else:
            return module


def _tie_again(model: Any) -> None:
    """Keep the tie where both ends were changed alike; otherwise record that there is none."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if torch.equal(head.weight, embedding.weight):
        head.weight = embedding.weight
    else:
        model.config.tie_word_embeddings = False
