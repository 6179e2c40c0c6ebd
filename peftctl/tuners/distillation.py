"""What distillation compares: the predictions of a teacher and a student, and the states that their heads read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def states_before_head(model: Any) -> Iterator[list[torch.Tensor]]:
    """Collect what the head reads in the forward passes inside: (n, d) each, at supervised positions.

    Args:
        model: A language model whose forward picks these positions (`models/supervised.py`).
    """
    seen: list[torch.Tensor] = []
    head = model.get_output_embeddings()
    # Behind the pre-hook that picks the positions.
    handle = head.register_forward_hook(lambda _, args, out: seen.append(args[0].flatten(0, -2)))
    try:
        yield seen
    finally:
        handle.remove()


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Return KL(softmax(teacher) || softmax(student)) of rows of logits, (n, vocab) -> (n,), in float32 or wider."""
    wide = torch.promote_types(student.dtype, torch.float32)
    log_p, log_q = teacher.log_softmax(-1, dtype=wide), student.log_softmax(-1, dtype=wide)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def mean_square(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Return the mean over d of the squared difference, (n, d) -> (n,), in float32 or wider."""
    wide = torch.promote_types(student.dtype, torch.float32)
    return (teacher.to(wide) - student.to(wide)).square().mean(-1)


def mean_of_rows(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return the scalar mean over rows of the mean over each row's tokens: batches of equal size add up to one.

    Args:
        values: (n,), of tokens, row after row.
        counts: (batch,), tokens of each row; a row without any counts as 0.
    """
    share = (1 / counts.clamp(min=1).to(values)).repeat_interleave(counts)
    return (values * share).sum() / len(counts)
