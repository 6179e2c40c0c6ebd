"""Whether a model's head can wait until the loss, which then makes logits a piece at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch

from peftctl.evaluation.mode import evaluating
from peftctl.models.classifier import classification_task
from peftctl.models.supervised import handing_on, inputs_of

_FEW = 8
"""Tokens of the pass that finds it out."""
_HANDED_ON: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()
"""Head -> whether the model returns its output as it is; soft-capping, scales and autocast come after others."""


def head_can_wait(model: Any, batch: Mapping[str, torch.Tensor]) -> bool:
    """Tell whether `supervised_forward` may be lean: the head is a frozen matrix, and its output the model's logits.

    Whether code follows the head is found out once, by a pass of a few tokens in evaluation mode.

    Args:
        model: As there, with whole weights.
        batch: As there.
    """
    head = None if classification_task(model) else model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head._forward_hooks or "forward" in vars(head):
        return False
    # In float16 the gradient of the logits is too small to be kept before the loss is scaled.
    if any(p.requires_grad or p.dtype == torch.float16 for p in head.parameters()):
        return False
    if head not in _HANDED_ON:
        _HANDED_ON[head] = _hands_on(model, inputs_of(model, batch), head)
    return _HANDED_ON[head]


def _hands_on(model: Any, inputs: Mapping[str, torch.Tensor], head: torch.nn.Linear) -> bool:
    few = {name: value[:1, :_FEW] if value.dim() > 1 else value[:1] for name, value in inputs.items()}
    gpus = [head.weight.device] if head.weight.device.type == "cuda" else []
    with torch.random.fork_rng(gpus), evaluating(model), handing_on(head) as given:
        try:
            logits = model(**few, use_cache=False).logits
        except Exception:  # what follows wants (n, vocab)
            return False
    return len(given) == 1 and given[0].states is logits and given[0].as_it_is()
