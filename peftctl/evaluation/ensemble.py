"""The test-time ensemble of LoRA-Dropout: the mean of the probabilities of modules with different masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from peftctl.models.supervised import Supervised, supervised_forward
from peftctl.tuners.dropped_factors import Members

Forward = Callable[[Any, Mapping[str, torch.Tensor]], Supervised]
"""Model, batch -> logits at its supervised positions."""


def ensemble_forward(model: Any, p: float, count: int, seed: int) -> Forward:
    """Return a forward pass whose logits are the logarithms of mean probabilities: one pass a member.

    Every member keeps its masks, so neither the size nor the order of batches changes what is measured.

    Args:
        model: A PeftModel with a LoRA or AdaLoRA adapter; what the pass must be called with.
        p: Share of columns and rows that a member lacks.
        count: Members.
        seed: Of the masks.
    """
    members = Members(model, p, count, seed)

    def forward(model: Any, batch: Mapping[str, torch.Tensor]) -> Supervised:
        mean: torch.Tensor | None = None
        for _ in members:
            part = supervised_forward(model, batch)
            wide = torch.promote_types(part.logits.dtype, torch.float32)
            ours = part.logits.log_softmax(dim=-1, dtype=wide) - math.log(count)
            mean = ours if mean is None else torch.logaddexp(mean, ours, out=mean)
        assert mean is not None  # there is at least one member
        return Supervised(mean, part.labels)

    return forward
