"""Metrics of generated answers and of classes, as shares of 1; and which of them a run measures.

Those of answers take (prediction, expected), and a run reports the mean. Those of classes take all rows at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean

from peftctl.errors import UsageError
from peftctl.recipe.schema import CLASSIFICATION, EvalSection, Task

_WORD = re.compile(r"[^\W_]+")


def exact_match(prediction: str, reference: str) -> float:
    """Return 1 where both are the same text, but for white space around it."""
    return float(prediction.strip() == reference.strip())


def rouge_l(prediction: str, reference: str) -> float:
    """Return the F1 of the longest common subsequence of words, Lin 2004 (aclanthology.org/W04-1013).

    F1 = 2 LCS / (words of the prediction + words of the reference), over lower-case words of letters and digits.
    """
    words, expected = _words(prediction), _words(reference)
    if not words and not expected:
        return 1.0
    return 2 * _common(words, expected) / (len(words) + len(expected))


def contains(prediction: str, expected: str) -> float:
    """Return 1 where the expected text, without white space around it, occurs in the prediction."""
    return float(expected.strip() in prediction)


def regex(prediction: str, pattern: str) -> float:
    """Return 1 where the pattern matches somewhere in the prediction; `.` matches line ends too."""
    return float(re.search(pattern, prediction, re.DOTALL) is not None)


METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "rouge_l": rouge_l,
    "contains": contains,
    "regex": regex,
}
"""Metrics that need generated answers, by their name in `eval.metrics`."""


def metric_names(section: EvalSection, task: Task, labels: Sequence[str | int] = ()) -> list[str]:
    """Return what to measure: `eval.metrics`, or the usual ones of the task.

    Args:
        section: The recipe's.
        task: What the model does.
        labels: The names of its classes.

    Raises:
        UsageError: entity_f1 is asked for, and the labels are no BIO tags.
    """
    entities = has_entities(labels)
    if section.metrics is None:
        if task not in CLASSIFICATION:
            return ["loss", "perplexity", "token_accuracy"]
        return ["loss", "accuracy", "entity_f1" if task == "token_cls" and entities else "macro_f1"]
    if "entity_f1" in section.metrics and not entities:
        raise UsageError(
            f"eval.metrics: entity_f1 needs BIO tags (O, B-NAME, I-NAME), and the labels are "
            f"{', '.join(map(str, labels))}; name them in data.labels, or take macro_f1"
        )
    return list(section.metrics)


def macro_f1(expected: Sequence[str], predicted: Sequence[str]) -> float:
    """Return the mean over classes of F1 = 2 TP / (2 TP + FP + FN).

    A class counts where it is expected or predicted at least once.
    """
    scores = []
    for label in {*expected, *predicted}:
        hits = sum(a == b == label for a, b in zip(expected, predicted, strict=True))
        scores.append(2 * hits / (expected.count(label) + predicted.count(label)))
    return fmean(scores)


def entity_f1(expected: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> float:
    """Return F1 = 2 TP / (found + to be found) over entities of all rows; 1 where there are none at all.

    An entity counts as found where its type, first and last word are right, as in the shared task of CoNLL (Tjong Kim
    Sang and De Meulder 2003, aclanthology.org/W03-0419).
    """
    hits = total = 0
    for tags, guesses in zip(expected, predicted, strict=True):
        truth, found = set(entities(tags)), set(entities(guesses))
        hits += len(truth & found)
        total += len(truth) + len(found)
    return 2 * hits / total if total else 1.0


def entities(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Yield (type, first word, last word) of the entities that BIO tags mark, as CoNLL's script reads them.

    An entity begins at B, and at an I that follows O, an entity of another type, or nothing.
    """
    start = 0
    for i, tag in enumerate(tags):
        mark, _, kind = tag.partition("-")
        before = tags[i - 1].partition("-")[2] if i else ""
        if mark == "B" or kind != before:
            start = i
        after = tags[i + 1] if i + 1 < len(tags) else "O"
        if mark in _MARKS and after != f"I-{kind}":
            yield kind, start, i


def has_entities(labels: Sequence[str | int]) -> bool:
    """Tell whether labels are BIO tags: all are O, B-NAME or I-NAME, and some are no O."""
    marks = {str(label).partition("-")[0] for label in labels if "-" in str(label)}
    return bool(marks) and marks <= _MARKS and all("-" in str(label) or label == "O" for label in labels)


_MARKS = {"B", "I"}


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence; `best[j]` is that of the words so far and second[:j]."""
    best = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for j, other in enumerate(second, start=1):
            diagonal, best[j] = best[j], diagonal + 1 if word == other else max(best[j], best[j - 1])
    return best[-1]
