"""Wrong answers of a row: read, encoded behind the same prompt, kept in the cache, and put beside a batch."""

import re

import pytest
import torch

from peftctl.data.collate import Collator
from peftctl.data.dataset import encode_all, fingerprint
from peftctl.data.formats import to_examples
from peftctl.data.prompts import generation_prompt
from peftctl.data.sources import Row
from peftctl.errors import DataError
from peftctl.recipe.schema import DataSection
from tests.tiny import tiny_tokenizer

ROWS = [
    {"prompt": "two plus two", "completion": "four", "wrong_answers": ["five", "a hundred"]},
    {"prompt": "the day", "completion": "friday"},
    {"prompt": "the hour, please", "completion": "seven", "wrong_answers": "noon"},
]


def section(**keys):
    return DataSection(**({"train": "rows.jsonl", "format": "prompt_completion"} | keys))


def examples(rows=ROWS, **keys):
    return to_examples([Row(fields, f"rows:{i}") for i, fields in enumerate(rows)], section(**keys))


@pytest.mark.parametrize("template", ["chat", "alpaca", "{prompt} is "])
@pytest.mark.parametrize("task", ["causal_lm", "seq2seq_lm"])
def test_each_wrong_answer_is_encoded_as_if_it_were_right(template, task):
    data, tokenizer = section(template=template), tiny_tokenizer()
    rows, report = encode_all(examples(template=template), tokenizer, data, task=task)
    assert [len(row.wrong) for row in rows] == [2, 0, 1] and report.rows == 3
    as_right = [ROWS[0] | {"completion": answer, "wrong_answers": None} for answer in ROWS[0]["wrong_answers"]]
    expected, _ = encode_all(examples(as_right, template=template), tokenizer, data, task=task)
    for found, right in zip(rows[0].wrong, expected, strict=True):
        assert (found.input_ids, found.labels, found.paired) == (right.input_ids, right.labels, right.paired)
    bare, _ = encode_all(examples([ROWS[0] | {"wrong_answers": []}], template=template), tokenizer, data, task=task)
    assert (bare[0].input_ids, bare[0].labels) == (rows[0].input_ids, rows[0].labels)


def test_alpaca_rows_have_them_too_and_columns_rename_them():
    rows = [{"instruction": "add", "input": "2", "output": "four", "no": ["five"]}]
    for template in ("chat", "alpaca", "{instruction} {input}:"):
        made = examples(rows, format="alpaca", template=template, columns={"wrong_answers": "no"})
        assert made[0].wrong_answers == ("five",)


def test_what_is_generated_from_does_not_change():
    data, tokenizer = section(), tiny_tokenizer()
    with_them, without = examples()[0], examples([ROWS[0] | {"wrong_answers": None}])[0]
    assert generation_prompt(with_them, tokenizer, data) == generation_prompt(without, tokenizer, data)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, r"field 'wrong_answers': expected text or a list of texts, got a number"),
        (["five", ""], r"field 'wrong_answers': expected text or a list of texts"),
        (["five", None], r"field 'wrong_answers': expected text or a list of texts"),
        (["five", "four"], r"field 'wrong_answers': has the right answer among the wrong ones; take it out"),
    ],
)
def test_what_is_no_wrong_answer_is_refused_with_its_place(value, message):
    with pytest.raises(DataError) as caught:
        examples([ROWS[0] | {"wrong_answers": value}])
    assert re.search(rf"^rows:0: {message}", str(caught.value))


def test_an_answer_of_which_nothing_is_left_is_left_out():
    """Here one that starts behind the last token that a row may have."""
    rows = [{"prompt": "two plus two:", "completion": "four", "wrong_answers": ["five", "9"]}]
    data = section(template="{prompt}")
    full, _ = encode_all(examples(rows, template="{prompt}"), tiny_tokenizer(), data)
    length = len(full[0].input_ids) - full[0].supervised
    row, _ = encode_all(
        examples(rows, template="{prompt}"), tiny_tokenizer(), data.model_copy(update={"max_length": length + 1})
    )
    assert [other.supervised for other in row[0].wrong] == [1, 1] and row[0].supervised == 1
    none, report = encode_all(
        examples([*rows, {"prompt": "2", "completion": "4"}], template="{prompt}"),
        tiny_tokenizer(),
        data.model_copy(update={"max_length": length, "max_dropped": 0.5}),
    )
    assert [len(row.wrong) for row in none] == [0] and report.rows == 2


def test_the_cache_gives_them_back_and_the_fingerprint_knows_them(tmp_path):
    data, tokenizer = section(), tiny_tokenizer()
    first, _ = encode_all(examples(), tokenizer, data, tmp_path)
    again, _ = encode_all(examples(), tokenizer, data, tmp_path)
    assert first == again and [len(row.wrong) for row in again] == [2, 0, 1]
    other = [ROWS[0] | {"wrong_answers": ["six", "a hundred"]}, *ROWS[1:]]
    changed, _ = encode_all(examples(other), tokenizer, data, tmp_path)
    assert changed[0].wrong[0] != first[0].wrong[0] and changed[0].wrong[1] == first[0].wrong[1]
    assert fingerprint(changed) != fingerprint(first)


def test_a_batch_has_them_beside_its_rows_where_they_are_asked_for():
    rows, _ = encode_all(examples(), tiny_tokenizer(), section())
    plain, asked = Collator(tiny_tokenizer())(rows), Collator(tiny_tokenizer(), None, ("choices",))(rows)
    assert set(plain) == {"input_ids", "attention_mask", "labels"}
    assert asked["choice_rows"].tolist() == [0, 0, 2]
    width = max(len(each.input_ids) for row in rows for each in (row, *row.wrong))
    for i, row in enumerate([*rows, *rows[0].wrong, *rows[2].wrong]):
        names = ("input_ids", "attention_mask", "labels")
        ids, mask, labels = (torch.cat([asked[n], asked[f"choice_{n}"]])[i].tolist() for n in names)
        rest = width - len(row.input_ids)
        assert (ids[: width - rest], mask) == (row.input_ids, [1] * (width - rest) + [0] * rest)
        assert labels == row.labels + [-100] * rest
    empty = Collator(tiny_tokenizer(), None, ("choices",))([])
    assert empty["input_ids"].shape == (1, 1) and empty["choice_input_ids"].shape == (0, 1)
    assert empty["choice_rows"].dtype is torch.int64
