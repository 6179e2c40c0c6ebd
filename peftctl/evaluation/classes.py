"""Loss, accuracy and F1 of classifiers on held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peftctl.data.encode import IGNORED, EncodedRow
from peftctl.errors import UsageError
from peftctl.evaluation.ensemble import Forward
from peftctl.evaluation.metrics import entity_f1, has_entities, macro_f1
from peftctl.evaluation.mode import evaluating
from peftctl.models.classifier import labels_of
from peftctl.models.supervised import supervised_forward

Collate = Callable[[Sequence[EncodedRow]], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Classified:
    """What a classifier says of rows, in their order.

    Args:
        metrics: loss (nats, mean over classes of all rows), accuracy, macro_f1, entity_f1 where labels are BIO tags,
            and supervised_tokens, how many classes were to be named.
        expected: Of each row the names of its classes: one of a text, one a word.
        predicted: The likeliest ones.
    """

    metrics: dict[str, float]
    expected: list[list[str]]
    predicted: list[list[str]]


def classify(
    model: Any,
    rows: Sequence[EncodedRow],
    collate: Collate,
    batch_size: int,
    forward: Forward = supervised_forward,
) -> Classified:
    """Measure a classifier.

    Args:
        model: A classifier; it is in its former mode afterwards.
        rows: Held-out rows.
        collate: Pads rows to a batch.
        batch_size: Rows a forward pass; changes memory and time, not the result.
        forward: Gives the logits; an ensemble's takes several passes.

    Raises:
        UsageError: No row has a class.
    """
    labels = labels_of(model)
    expected = [[labels[label] for label in row.labels if label != IGNORED] for row in rows]
    count = sum(map(len, expected))
    if not count:
        raise UsageError("data.eval: no held-out row has a label; check data.format")
    # Rows of similar length together, so that little is padding; the longest first, so that memory runs out at once.
    order = sorted(range(len(rows)), key=lambda i: rows[i].tokens, reverse=True)
    predicted: list[list[str]] = [[] for _ in rows]
    loss = 0.0
    with evaluating(model) as device:
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            inputs = {name: value.to(device) for name, value in collate([rows[i] for i in batch]).items()}
            part = forward(model, inputs)
            loss += float(part.cross_entropy())
            chosen = iter(part.logits.argmax(dim=-1).tolist())
            for i in batch:
                predicted[i] = [labels[next(chosen)] for _ in expected[i]]
    pairs = [pair for row in zip(expected, predicted, strict=True) for pair in zip(*row, strict=True)]
    metrics = {"loss": loss / count, "accuracy": sum(a == b for a, b in pairs) / count}
    metrics["macro_f1"] = macro_f1(*zip(*pairs, strict=True))
    if has_entities(labels):
        metrics["entity_f1"] = entity_f1(expected, predicted)
    return Classified({**metrics, "supervised_tokens": count}, expected, predicted)
