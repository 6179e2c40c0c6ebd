"""Metrics of generated answers: each takes (prediction, expected) and returns a share of 1; a run reports the mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

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
