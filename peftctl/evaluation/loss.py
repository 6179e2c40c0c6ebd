"""Loss, perplexity and token accuracy on held-out rows; accuracy and F1 of classifiers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from peftctl.backends import processes
from peftctl.data.encode import EncodedRow
from peftctl.errors import UsageError
from peftctl.evaluation.classes import classify
from peftctl.evaluation.ensemble import Forward
from peftctl.evaluation.mode import evaluating
from peftctl.models.classifier import classification_task
from peftctl.models.supervised import supervised_forward


def held_out_loss(
    model: Any,
    rows: Sequence[EncodedRow],
    collate: Callable[[Sequence[EncodedRow]], Mapping[str, torch.Tensor]],
    batch_size: int,
    *,
    together: bool = False,
    forward: Forward = supervised_forward,
) -> dict[str, float]:
    """Measure how well a model predicts the supervised tokens, or the classes, of rows.

    Args:
        model: A language model or a classifier; it is in its former mode afterwards.
        rows: Held-out rows.
        collate: Pads rows to a batch.
        batch_size: Rows a forward pass; changes memory and time, not the result.
        together: Every process of the run calls this, and takes a share of the rows.
        forward: Gives the logits; an ensemble's takes several passes.

    Returns:
        loss (nats, mean over supervised tokens of all rows), perplexity, token_accuracy (share of supervised tokens
        that had the highest logit) and supervised_tokens; of a classifier what `classify` measures.

    Raises:
        UsageError: No row has a supervised token.
    """
    if classification_task(model):
        return classify(model, rows, collate, batch_size, forward).metrics
    # Rows of similar length together, so that little is padding; the longest first, so that memory runs out at once.
    ordered = sorted(rows, key=lambda row: row.tokens, reverse=True)
    batches = [ordered[first : first + batch_size] for first in range(0, len(ordered), batch_size)]
    if together:  # all take equally many passes, the last may be empty: an engine may need every process for each
        size, rank = processes.size(), processes.rank()
        batches = [batches[i] if i < len(batches) else [] for i in range(rank, len(batches) + rank, size)]
    loss, correct, tokens = 0.0, 0, 0
    with evaluating(model) as device:
        for rows_of_batch in batches:
            batch = collate(rows_of_batch)
            part = forward(model, {name: value.to(device) for name, value in batch.items()})
            loss += float(part.cross_entropy())
            correct += int(part.correct())
            tokens += len(part.labels)
    if together:
        loss, *counts = processes.summed([loss, correct, tokens])
        correct, tokens = map(int, counts)
    if not tokens:
        raise UsageError("data.eval: no held-out row has a token to predict; check data.format and data.loss_on")
    mean = loss / tokens
    return {
        "loss": mean,
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "token_accuracy": correct / tokens,
        "supervised_tokens": tokens,
    }
