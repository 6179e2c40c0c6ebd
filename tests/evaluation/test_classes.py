"""Metrics of classifiers against values worked out by hand and against the library's own loss."""

import itertools
import random

import pytest
import torch

from peftctl.data.collate import Collator
from peftctl.data.encode import EncodedRow
from peftctl.data.formats import Example
from peftctl.errors import UsageError
from peftctl.evaluation.classes import classify
from peftctl.evaluation.evaluate import evaluate_rows
from peftctl.evaluation.loss import held_out_loss
from peftctl.evaluation.metrics import entities, entity_f1, has_entities, macro_f1, metric_names
from peftctl.recipe.schema import DataSection, EvalSection
from tests.tiny import tiny_bert, tiny_tokenizer

BIO = ["O", "B-X", "I-X", "B-Y", "I-Y"]


@pytest.mark.parametrize(
    ("expected", "predicted", "value"),
    [
        ("aab", "aab", 1.0),
        # a: TP 1, FP 0, FN 1 -> 2/3; b: TP 1, FP 1, FN 0 -> 2/3
        ("aab", "abb", 2 / 3),
        # a: 2 * 2 / (2 + 3) = 0.8; b: 0
        ("aab", "aaa", 0.4),
        # c is only predicted: a 2 * 1 / 3, b 1, c 0
        ("aab", "acb", (2 / 3 + 1 + 0) / 3),
        ("a", "b", 0.0),
    ],
)
def test_macro_f1(expected, predicted, value):
    assert macro_f1(list(expected), list(predicted)) == pytest.approx(value)


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O O", []),
        ("B-X I-X O B-Y", [("X", 0, 1), ("Y", 3, 3)]),
        ("O I-X I-X", [("X", 1, 2)]),  # an I after O begins one
        ("I-X", [("X", 0, 0)]),
        ("B-X I-Y I-Y", [("X", 0, 0), ("Y", 1, 2)]),  # so does an I of another type
        ("B-X B-X I-X", [("X", 0, 0), ("X", 1, 2)]),  # neighbours of one type
        ("I-X B-X", [("X", 0, 0), ("X", 1, 1)]),
        ("I-X I-Y I-X", [("X", 0, 0), ("Y", 1, 1), ("X", 2, 2)]),
        ("B-X O I-X", [("X", 0, 0), ("X", 2, 2)]),
        ("B-a-b I-a-b", [("a-b", 0, 1)]),
        ("", []),
    ],
)
def test_entities_are_those_of_conll(tags, found):
    assert list(entities(tags.split())) == found


def test_entities_of_every_short_sentence():
    def naive(tags):
        """Begin at B, or at I whose neighbour on the left is of no or another type; take I of the type as they come."""
        found = []
        for first, tag in enumerate(tags):
            left = tags[first - 1][2:] if first else ""
            if tag == "O" or (tag[0] == "I" and left == tag[2:]):
                continue
            last = first
            while last + 1 < len(tags) and tags[last + 1] == "I-" + tag[2:]:
                last += 1
            found.append((tag[2:], first, last))
        return found

    for length in range(5):
        for tags in itertools.product(BIO, repeat=length):
            assert list(entities(tags)) == naive(tags), tags


def test_entity_f1_counts_whole_entities():
    expected = [["B-X", "I-X", "O", "B-Y"], ["B-X", "O"], ["O"]]
    predicted = [["B-X", "I-X", "O", "B-X"], ["B-X", "I-X"], ["O"]]
    # One of three is right (type wrong, then too long), three were found.
    assert entity_f1(expected, predicted) == pytest.approx(2 * 1 / (3 + 3))
    assert entity_f1(expected, expected) == 1.0
    assert entity_f1([["O"]], [["O"]]) == 1.0
    assert entity_f1([["O"]], [["B-X"]]) == 0.0
    # The same entity in another row is another one.
    assert entity_f1([["B-X"], ["O"]], [["O"], ["B-X"]]) == 0.0


@pytest.mark.parametrize(
    ("labels", "expected"),
    [(BIO, True), (["O", "NOUN"], False), (["0", "1"], False), (["O"], False), (["B-X", "S-X"], False), ([], False)],
)
def test_which_labels_are_bio_tags(labels, expected):
    assert has_entities(labels) is expected


def test_the_usual_metrics_fit_task_and_labels():
    silent = EvalSection()
    assert metric_names(silent, "causal_lm") == ["loss", "perplexity", "token_accuracy"]
    assert metric_names(silent, "seq_cls", ["a", "b"]) == ["loss", "accuracy", "macro_f1"]
    assert metric_names(silent, "token_cls", BIO) == ["loss", "accuracy", "entity_f1"]
    assert metric_names(silent, "token_cls", ["NOUN", "VERB"]) == ["loss", "accuracy", "macro_f1"]
    assert metric_names(EvalSection(metrics=["loss"]), "seq_cls", ["a", "b"]) == ["loss"]


def test_entity_f1_of_other_labels_is_refused():
    with pytest.raises(UsageError, match=r"entity_f1 needs BIO tags.*NOUN, VERB"):
        metric_names(EvalSection(metrics=["entity_f1"]), "token_cls", ["NOUN", "VERB"])


def classifier(kind, labels):
    names = dict(enumerate(labels))
    return tiny_bert(kind=f"BertFor{kind}Classification", id2label=names, label2id={v: k for k, v in names.items()})


def text_rows(count=9, classes=3):
    rng = random.Random(0)
    return [
        EncodedRow([rng.randrange(4, 400) for _ in range(rng.randrange(1, 9))], [i % classes], f"a:{i}", classes=True)
        for i in range(count)
    ]


def tag_rows(count=7):
    rng = random.Random(1)
    rows = []
    for i in range(count):
        length = rng.randrange(2, 9)
        labels = [rng.choice([-100, 0, 1, 2, 3, 4]) for _ in range(length - 1)] + [0]
        rows.append(EncodedRow([rng.randrange(4, 400) for _ in range(length)], labels, f"a:{i}", classes=True))
    return rows


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_texts_one_by_one_give_the_same_loss_and_classes(batch_size):
    model, rows, names = classifier("Sequence", "abc"), text_rows(), "abc"
    found = classify(model, rows, Collator(tiny_tokenizer()), batch_size)
    losses, guesses = [], []
    for row in rows:
        with torch.no_grad():
            out = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor(row.labels))
        losses.append(float(out.loss))
        guesses.append([names[int(out.logits.argmax())]])
    assert found.metrics["loss"] == pytest.approx(sum(losses) / len(rows), rel=1e-5)
    assert found.predicted == guesses
    assert found.expected == [[names[row.labels[0]]] for row in rows]
    right = sum(a == b for a, b in zip(found.expected, guesses, strict=True))
    assert found.metrics["accuracy"] == right / len(rows)
    assert found.metrics["supervised_tokens"] == len(rows)
    assert "entity_f1" not in found.metrics


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_words_one_by_one_give_the_same_loss_and_classes(batch_size):
    model, rows = classifier("Token", BIO), tag_rows()
    found = classify(model, rows, Collator(tiny_tokenizer(), 8), batch_size)
    total, guesses = 0.0, []
    for row in rows:
        labels = torch.tensor([row.labels])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.input_ids])).logits
        total += float(torch.nn.functional.cross_entropy(logits[0].double(), labels[0], reduction="sum"))
        guesses.append([BIO[int(logits[0, i].argmax())] for i, label in enumerate(row.labels) if label != -100])
    count = sum(row.supervised for row in rows)
    assert found.predicted == guesses
    assert found.metrics["supervised_tokens"] == count
    assert found.metrics["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found.metrics["entity_f1"] == entity_f1(found.expected, guesses)


def test_held_out_losses_during_training_are_those_of_a_classifier():
    model, rows, collate = classifier("Sequence", "abc"), text_rows(), Collator(tiny_tokenizer())
    assert held_out_loss(model, rows, collate, 4) == classify(model, rows, collate, 4).metrics


def test_rows_without_a_class_are_an_error():
    row = EncodedRow([5], [-100], "a:1", classes=True)
    with pytest.raises(UsageError, match="no held-out row has a label"):
        classify(classifier("Token", BIO), [row], Collator(tiny_tokenizer()), 2)


def test_samples_hold_text_reference_and_prediction():
    model, rows = classifier("Sequence", "abc"), text_rows(4)
    examples = [Example(row.where, text=f"text {i}", label="abc"[row.labels[0]]) for i, row in enumerate(rows)]
    kept = [rows[0], *rows[2:]]  # one was dropped
    data = DataSection(train="a", format="labelled_text", labels=["a", "b", "c"])
    result = evaluate_rows(
        model, tiny_tokenizer(), examples, kept, data, EvalSection(rows=3), Collator(tiny_tokenizer())
    )
    assert list(result.metrics) == ["loss", "accuracy", "macro_f1"]
    assert [(s["where"], s["text"], s["reference"]) for s in result.samples] == [
        ("a:0", "text 0", "a"),
        ("a:2", "text 2", "c"),
    ]
    found = classify(model, kept, Collator(tiny_tokenizer()), 4)
    assert [s["prediction"] for s in result.samples] == [found.predicted[0][0], found.predicted[1][0]]
    tags = tag_rows(1)
    words = [Example("a:0", tokens=["x", "y"], tags=["O", "O"])]
    result = evaluate_rows(
        classifier("Token", BIO), tiny_tokenizer(), words, tags, data, EvalSection(), Collator(tiny_tokenizer())
    )
    assert result.samples[0]["text"] == "x y"
    assert result.samples[0]["reference"] == " ".join(BIO[label] for label in tags[0].labels if label >= 0)


def test_a_language_metric_of_a_classifier_is_an_error():
    data = DataSection(train="a", format="labelled_text", labels=["a", "b", "c"])
    with pytest.raises(UsageError, match="a classifier has no perplexity"):
        evaluate_rows(
            classifier("Sequence", "abc"), tiny_tokenizer(), [], text_rows(), data,
            EvalSection(metrics=["perplexity"]), Collator(tiny_tokenizer()),
        )  # fmt: skip
