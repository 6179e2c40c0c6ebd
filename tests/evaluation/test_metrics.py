"""Metrics against values worked out by hand."""

import pytest

from peftctl.evaluation.metrics import METRICS, contains, exact_match, regex, rouge_l
from peftctl.recipe.schema import Metric


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [(" yes\n", "yes", 1), ("Yes", "yes", 0), ("a b", "a  b", 0), ("", " ", 1), ("yes.", "yes", 0)],
)
def test_exact_match(prediction, reference, expected):
    assert exact_match(prediction, reference) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("the cat sat on the mat", "the cat sat on the mat", 1.0),
        # LCS "the cat the mat" = 4; 2 * 4 / (6 + 5)
        ("the cat sat on the mat", "the cat lay, the MAT!", 8 / 11),
        # LCS of a b c d and d c b a is one word; 2 * 1 / 8
        ("a b c d", "d c b a", 0.25),
        # LCS "b d" (not contiguous) = 2; 2 * 2 / (4 + 2)
        ("a b c d", "b d", 4 / 6),
        # a repeated word counts once: 2 * 1 / (3 + 1)
        ("no no no", "no", 0.5),
        ('{"day": "friday"}', "day friday", 1.0),
        ("Größe 7", "größe 7", 1.0),
        ("one", "two", 0.0),
        ("", "two", 0.0),
        ("...", "", 1.0),
    ],
)
def test_rouge_l(prediction, reference, expected):
    assert rouge_l(prediction, reference) == pytest.approx(expected)


def test_contains():
    assert contains("the answer is 42.", " 42\n") == 1
    assert contains("the answer is 4 2", "42") == 0


def test_regex():
    assert regex("answer:\n42", r"answer:.*\d+$") == 1
    assert regex("answer", r"^\d") == 0


def test_every_metric_of_the_recipe_is_known():
    from typing import get_args

    names = set(get_args(Metric))
    of_classes = {"accuracy", "macro_f1", "entity_f1"}
    assert names == {"loss", "perplexity", "token_accuracy"} | of_classes | METRICS.keys()
