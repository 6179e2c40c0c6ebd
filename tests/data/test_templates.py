"""Plain templates."""

from __future__ import annotations

import pytest

from peftctl.data.templates import alpaca_prompt, check, fill
from peftctl.errors import DataError


def test_alpaca_with_input():
    assert alpaca_prompt("Add.", "1 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )


def test_fields_are_filled_in_and_braces_kept():
    assert fill('{{"q": "{question}", "n": {n}}}', {"question": "a {b}", "n": 3}, "x:1") == '{"q": "a {b}", "n": 3}'


def test_field_names_may_hold_spaces_and_dots():
    assert fill("{my question} {a.b}", {"my question": "x", "a.b": "y"}, "x:1") == "x y"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{prompt", "braces don't match"),
        ("prompt}", "braces don't match"),
        ("{}", r"expected a plain \{field\}"),
        ("{prompt!r}", r"expected a plain \{field\}"),
        ("{prompt:>5}", r"expected a plain \{field\}"),
        ("alpacca", "did you mean 'alpaca'"),
        ("{prompt} {completion}", r"names \{completion\}, the answer; leave it out"),
    ],
)
def test_templates_that_can_not_be_filled_in(template, said):
    with pytest.raises(DataError, match=rf"^data.template: .*{said}"):
        check(template, answer="completion")


def test_unknown_field_names_the_row_and_what_it_has():
    with pytest.raises(DataError, match=r"^x.jsonl:3: data.template names \{q\}; the row has: prompt, completion$"):
        fill("{q}", {"prompt": "a", "completion": "b"}, "x.jsonl:3")


@pytest.mark.parametrize(("value", "found"), [(None, "null"), (True, "true or false"), (["a"], "a list")])
def test_only_text_and_numbers(value, found):
    with pytest.raises(DataError, match=f"expected text or a number, got {found}"):
        fill("{q}", {"q": value}, "x:1")
