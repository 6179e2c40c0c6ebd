# ruff: noqa: E501 -- messages stand whole on a line, so that a search finds them
import os

import pytest

from peftctl.recipe.rules import FORMAT_FIELDS
from tests.recipe.fakes import GOOD, problems, read


def with_data(*lines, more=""):
    keys = "".join(f"\n  {line}" for line in lines)
    return GOOD.replace("  train: rows.jsonl", "  train: rows.jsonl" + keys) + more


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (with_data("eval: held.jsonl", "eval_fraction: 0.1"), "x.yaml:10:3: data.eval_fraction: contradicts data.eval, which is set too; keep one of the two"),
        (GOOD + "  warmup_steps: 2\n  warmup_ratio: 0.1\n", "x.yaml:13:3: train.warmup_ratio: contradicts train.warmup_steps, which is set too; keep one of the two"),
        (GOOD + "  epochs: 1\n  max_steps: 3\n", "x.yaml:13:3: train.max_steps: contradicts train.epochs, which is set too; keep one of the two"),
        (GOOD + "  eval_steps: 5\n", "x.yaml:12:3: train.eval_steps: there are no held-out rows to measure; set data.eval or data.eval_fraction, or remove it"),
        (with_data("packing: true"), "x.yaml:9:3: data.packing: packing is not in this version; set it to false"),
        (with_data("format: text", "template: chat"), "x.yaml:10:3: data.template: format text does not read it; remove it"),
        (with_data("loss_on: all", "format: text"), "x.yaml:9:3: data.loss_on: format text does not read it; remove it"),
        (with_data("eval: [held.jsonl, ./rows.jsonl]"), "x.yaml:9:22: data.eval: rows.jsonl is a training file too; hold out other rows, or use data.eval_fraction"),
        (GOOD + "eval:\n  pattern: x\n", "x.yaml:13:3: eval.pattern: only the metrics contains and regex read it; add one of them to eval.metrics, or remove it"),
        (GOOD + "eval:\n  metrics: [loss, regex]\n", "x.yaml:13:3: eval.metrics: regex needs eval.pattern; set eval.pattern"),
        (GOOD + "eval:\n  metrics: [regex]\n  pattern: '(a'\n", "x.yaml:14:12: eval.pattern: not a regular expression (missing ), unterminated subpattern at position 0); correct it"),
        (with_data("format: labelled_text"), "x.yaml:9:3: data.format: labelled_text does not fit model.task causal_lm; use messages or sharegpt or alpaca or prompt_completion or text, or change model.task"),
        (GOOD.replace("org/tiny", "org/tiny\n  task: seq_cls"), "x.yaml:4:3: data.format: messages does not fit model.task seq_cls; use labelled_text, or change model.task"),
        (with_data("format: text").replace("org/tiny", "org/tiny\n  task: token_cls"), "x.yaml:10:3: data.format: text does not fit model.task token_cls; use tokens_tags, or change model.task"),
        (with_data("format: text").replace("org/tiny", "org/tiny\n  task: seq2seq_lm"), "x.yaml:10:3: data.format: text does not fit model.task seq2seq_lm; use messages or sharegpt or alpaca or prompt_completion, or change model.task"),
        (with_data("loss_on: all").replace("org/tiny", "org/tiny\n  task: seq2seq_lm"), "x.yaml:10:3: data.loss_on: all has no meaning for seq2seq_lm: it reads prompts and writes answers; remove it"),
        (with_data("columns: {mesages: turns}"), "x.yaml:9:13: data.columns.mesages: not a field of format messages; did you mean 'messages'?"),
        (with_data("format: alpaca", "columns:", "  input: a", "  prompt: b"), "x.yaml:12:5: data.columns.prompt: not a field of format alpaca; known: input, instruction, output, system, wrong_answers"),
        (with_data("eval: []"), "x.yaml:9:9: data.eval: expected at least one file, got an empty list"),
    ],
)  # fmt: skip
def test_a_broken_rule(here, text, message):
    assert problems(text) == [message]


@pytest.mark.parametrize(
    "text",
    [
        with_data("eval_fraction: 0.1", more="  eval_steps: 5\n"),
        with_data("eval: held.jsonl", more="  eval_steps: 5\n"),
        GOOD + "  epochs: 2\n  max_steps: null\n",
        GOOD + "  max_steps: 2\n",
        with_data("packing: false"),
        with_data("format: text", "template: null"),
        GOOD + "eval:\n  metrics: [contains]\n",
        GOOD + "eval:\n  metrics: [contains]\n  pattern: '(a'\n",
        GOOD + "eval:\n  metrics: [regex]\n  pattern: '\\d+'\n",
        with_data("format: labelled_text").replace("org/tiny", "org/tiny\n  task: seq_cls"),
        with_data("format: tokens_tags").replace("org/tiny", "org/tiny\n  task: token_cls"),
        with_data("format: prompt_completion").replace("org/tiny", "org/tiny\n  task: seq2seq_lm"),
        with_data("columns: {messages: turns, tools: functions}"),
    ],
)
def test_what_the_rules_allow(here, text):
    if "template: null" in text:
        assert problems(text) == [
            "x.yaml:10:13: data.template: expected text, got nothing; give a value, or remove the key"
        ]
    else:
        read(text)


def test_rules_speak_up_beside_other_problems(here):
    text = (
        with_data("eval: held.jsonl", "eval_fraction: 0.1", "max_length: no", "columns: {turns: x}") + "  epochs: x\n"
    )
    assert [line.split(": ")[1] for line in problems(text + "  max_steps: 3\n")] == [
        "data.eval_fraction",
        "data.max_length",
        "data.columns.turns",
        "train.epochs",
        "train.max_steps",
    ]


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs links")
def test_a_link_to_the_training_file_is_found_out(here):
    (here / "link.jsonl").symlink_to(here / "rows.jsonl")
    assert problems(with_data("eval: link.jsonl")) == [
        "x.yaml:9:9: data.eval: link.jsonl is a training file too; hold out other rows, or use data.eval_fraction"
    ]


def test_every_format_has_its_fields():
    from typing import get_args

    from peftctl.recipe.schema import Format

    assert set(FORMAT_FIELDS) == set(get_args(Format))
