"""`${NAME}` in every place of a recipe: nested mappings, lists, and keys whose values are paths."""

import pytest

from tests.recipe.fakes import GOOD, problems, read

MODEL = "org/tiny\n  adapters:\n  - ${OWNER}/first\n  - org/${WHICH}\n  add_tokens: ['<${WHICH}>']"
SOURCES = (
    "  sources:\n  - path: ${ROWS}\n    weight: ${WEIGHT}\n    columns: {messages: '${COLUMN:-turns}'}\n"
    "  - {path: [held.jsonl, '${ROWS}'], format: text}\n  loss_on: all"
)
NESTED = GOOD.replace("org/tiny", MODEL).replace("  train: rows.jsonl", SOURCES)


@pytest.fixture
def variables(here, monkeypatch):
    for name, value in {"OWNER": "me", "WHICH": "second", "ROWS": "rows.jsonl", "WEIGHT": "0.5"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("COLUMN", raising=False)
    return here


def test_nested_values_and_lists(variables):
    recipe = read(NESTED)
    assert recipe.model.adapters == ["me/first", "org/second"] and recipe.model.add_tokens == ["<second>"]
    first, second = recipe.data.sources
    assert (
        first.path == str(variables / "rows.jsonl") and first.weight == 0.5 and first.columns == {"messages": "turns"}
    )
    assert second.path == [str(variables / "held.jsonl"), str(variables / "rows.jsonl")]


def test_new_keys_on_the_command_line(variables):
    recipe = read(GOOD, "model.adapters=['${OWNER}/first']", "data.sources=[{path: '${ROWS}', weight: 2}]")
    assert recipe.model.adapters == ["me/first"]
    assert recipe.data.sources[0].path == str(variables / "rows.jsonl")


def test_one_that_is_not_set_is_named_where_it_stands(variables, monkeypatch):
    monkeypatch.delenv("OWNER")
    assert problems(NESTED) == ["x.yaml:5:5: environment variable OWNER is not set; set it, or write ${OWNER:-default}"]
