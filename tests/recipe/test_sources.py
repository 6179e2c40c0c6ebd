# ruff: noqa: E501 -- messages stand whole on a line, so that a search finds them
"""`data.sources` in a recipe: its errors, its rules, and its way out to YAML and back."""

import json

import pytest

from peftctl.recipe.jsonschema import recipe_json_schema
from peftctl.recipe.write import diff_recipes, dump_recipe
from tests.recipe.fakes import GOOD, METHODS, problems, read

TWO = "{path: rows.jsonl}, {path: held.jsonl, weight: 0.25}"


def with_sources(entries, *lines, more=""):
    keys = "".join(f"\n  {line}" for line in lines)
    return GOOD.replace("  train: rows.jsonl", f"  sources: [{entries}]{keys}") + more


def test_sources_are_read_with_absolute_paths(here):
    sources = read(with_sources(TWO)).data.sources
    assert [(s.path, s.weight, s.format, s.columns) for s in sources] == [
        (str(here / "rows.jsonl"), 1.0, None, None),
        (str(here / "held.jsonl"), 0.25, None, None),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (with_sources("{path: rows.jsonl}, {path: held.jsonl, weigth: 2}"), "x.yaml:8:52: data.sources[1].weigth: unknown key; did you mean 'weight'?"),
        (with_sources("{path: rows.jsonl}, {weight: 2}"), "x.yaml:8:33: data.sources[1].path: required key is missing; add it under `data.sources[1]:`"),
        (with_sources("{path: rows.jsonl, weight: 0}"), "x.yaml:8:40: data.sources[0].weight: expected a number above 0, got 0"),
        (with_sources("{path: rows.jsonl, weight: '2'}"), 'x.yaml:8:40: data.sources[0].weight: expected a number, got text "2"; remove the quotes'),
        (with_sources("{path: rows.jsonl, format: alpacca}"), 'x.yaml:8:40: data.sources[0].format: expected one of messages, sharegpt, alpaca, prompt_completion, text, labelled_text, tokens_tags, got text "alpacca"; did you mean \'alpaca\'?'),
        (with_sources("{path: row.jsonl}"), "x.yaml:8:20: data.sources[0].path: no such file: 'row.jsonl'; did you mean 'rows.jsonl'?"),
        (with_sources("rows.jsonl"), 'x.yaml:8:13: data.sources[0]: expected a mapping, got text "rows.jsonl"'),
        (GOOD.replace("  train: rows.jsonl", "  sources: []"), "x.yaml:8:3: data.sources: expected at least one source, got an empty list"),
        (GOOD.replace("  train: rows.jsonl", "  max_length: 9"), "x.yaml:7:1: data.train: required key is missing; add it under `data:`, or data.sources"),
        (GOOD.replace("  train: rows.jsonl", "  train: rows.jsonl\n  sources: [{path: held.jsonl}]"), "x.yaml:9:3: data.sources: contradicts data.train, which is set too; keep one of the two"),
        (with_sources(TWO, "eval: held.jsonl"), "x.yaml:9:9: data.eval: held.jsonl is a training file too; hold out other rows, or use data.eval_fraction"),
        (with_sources("{path: rows.jsonl}, {path: [held.jsonl, ./rows.jsonl]}", "eval_fraction: 0.1"), "x.yaml:8:53: data.sources[1].path: rows.jsonl is in an earlier source too; so data.eval_fraction would hold out rows that are trained on: name data.eval, or remove it"),
        (with_sources("{path: rows.jsonl, format: labelled_text}"), "x.yaml:8:32: data.sources[0].format: labelled_text does not fit model.task causal_lm; use messages or sharegpt or alpaca or prompt_completion or text, or change model.task"),
        (with_sources(TWO, "format: labelled_text"), "x.yaml:9:3: data.format: labelled_text does not fit model.task causal_lm; use messages or sharegpt or alpaca or prompt_completion or text, or change model.task"),
        (with_sources("{path: rows.jsonl, format: alpaca, columns: {prompt: q}}"), "x.yaml:8:58: data.sources[0].columns.prompt: not a field of format alpaca; known: input, instruction, output, system, wrong_answers"),
        (with_sources("{path: rows.jsonl, columns: {mesages: q}}"), "x.yaml:8:42: data.sources[0].columns.mesages: not a field of format messages; did you mean 'messages'?"),
        (with_sources("{path: rows.jsonl}, {path: held.jsonl, format: text}", "columns: {messages: m}"), "x.yaml:9:13: data.columns.messages: not a field of format text; give data.sources[1], which has that format, columns of its own"),
        (with_sources("{path: rows.jsonl, format: text}", "loss_on: all"), "x.yaml:9:3: data.loss_on: format text does not read it; remove it"),
    ],
)  # fmt: skip
def test_a_wrong_source(here, text, message):
    assert problems(text) == [message]


@pytest.mark.parametrize(
    "text",
    [
        with_sources("{path: rows.jsonl}, {path: rows.jsonl, weight: 2}"),
        with_sources("{path: rows.jsonl, format: alpaca, columns: {instruction: q}}"),
        with_sources("{path: rows.jsonl, format: text}, {path: held.jsonl}", "loss_on: all"),
        with_sources("{path: rows.jsonl, format: messages}", "format: text", "loss_on: all"),
        with_sources("{path: rows.jsonl, format: null, columns: null}"),
        with_sources(TWO, "eval_fraction: 0.1"),
        with_sources("{path: rows.jsonl, format: labelled_text}").replace("org/tiny", "org/tiny\n  task: seq_cls"),
    ],
)
def test_what_the_rules_allow(here, text):
    recipe = read(text)
    dumped = dump_recipe(recipe)
    assert "null" not in dumped
    assert not diff_recipes(read(dumped), recipe)
    assert read(dumped).data == recipe.data


def test_a_source_is_written_in_block_style_without_silent_keys(here):
    dumped = dump_recipe(
        read(with_sources("{path: rows.jsonl, weight: 2, columns: {messages: '${x}'}}".replace("${", "$${")))
    )
    path = here / "rows.jsonl"
    assert f"  sources:\n  - path: {path}\n    weight: 2.0\n    columns:\n      messages: $${{x}}\n" in dumped
    assert read(dumped).data.sources[0].columns == {"messages": "${x}"}


def test_the_command_line_displaces_one_by_the_other(here):
    assert read(with_sources(TWO), "data.train=rows.jsonl").data.sources is None
    recipe = read(GOOD, "data.sources=[{path: rows.jsonl, weight: 0.5}]")
    assert recipe.data.train is None and recipe.data.sources[0].weight == 0.5
    assert problems(GOOD, "data.sources=[{path: rows.jsonl, wait: 0.5}]") == [
        "command line: data.sources: data.sources[0].wait: unknown key; did you mean 'weight'?"
    ]


def test_differences_name_the_source(here):
    one = read(with_sources(TWO))
    other = read(with_sources("{path: rows.jsonl, format: text}, {path: held.jsonl, weight: 0.5}, {path: rows.jsonl}"))
    path = here / "rows.jsonl"
    assert diff_recipes(one, other) == [
        "data.sources[0].format: unset -> text",
        "data.sources[1].weight: 0.25 -> 0.5",
        f"data.sources[2].path: unset -> {path}",
        "data.sources[2].weight: unset -> 1.0",
    ]
    assert diff_recipes(read(GOOD), read(with_sources("{path: rows.jsonl}"))) == [
        f"data.train: {path} -> unset",
        f"data.sources[0].path: unset -> {path}",
        "data.sources[0].weight: unset -> 1.0",
    ]


def test_the_json_schema_describes_a_source():
    schema = recipe_json_schema(METHODS)
    source = schema["$defs"]["Source"]
    assert source["required"] == ["path"] and source["additionalProperties"] is False
    assert source["properties"]["weight"]["exclusiveMinimum"] == 0
    assert "drawn by the seed" in source["properties"]["weight"]["description"]
    assert "#/$defs/Source" in json.dumps(schema["$defs"]["DataSection"]["properties"]["sources"])
