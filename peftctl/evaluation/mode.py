"""Switch a model to evaluation and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients; yields the model's device.

    Every module gets its own mode back, since a method may keep some of them in evaluation mode while it trains.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # Not inference_mode: tensors that a model caches in it could not take part in training afterwards.
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        for module in training:
            module.training = True
