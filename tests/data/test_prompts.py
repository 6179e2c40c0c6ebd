"""Generation starts from exactly the ids that stood before the answer in training."""

from __future__ import annotations

import pytest

from peftctl.data.encode import encode
from peftctl.data.prompts import generation_prompt, generation_prompts
from peftctl.errors import DataError
from tests.data import styles
from tests.data.rows import ONE_TURN, TWO_TURNS, assistant, example, section, system, user
from tests.data.styles import byte_level, metaspace

STYLES = [
    styles.LLAMA3, styles.CHATML, styles.CHATML_BARE, styles.MISTRAL_V1, styles.MISTRAL_V3, styles.LLAMA2, styles.GEMMA,
    styles.QWEN3, styles.R1, styles.PHI3, styles.ZEPHYR, styles.HARMONY, styles.NO_TOKENS,
]  # fmt: skip


def unsupervised_prefix(row):
    return row.input_ids[: next(i for i, label in enumerate(row.labels) if label != -100)]


@pytest.mark.parametrize("build", [byte_level, metaspace])
@pytest.mark.parametrize("template", STYLES)
@pytest.mark.parametrize("answer", ["Hello", " Hello", "\nHello"])
def test_single_turns(build, template, answer):
    found = example(messages=[user("Hi there"), assistant(answer)])
    (row,) = encode(found, build(template), section())
    assert generation_prompt(found, build(template), section()) == (unsupervised_prefix(row), answer)


@pytest.mark.parametrize("template", STYLES)
def test_last_turn_of_several(template):
    found = example(messages=TWO_TURNS)
    data = section(loss_on="last_turn")
    (row,) = encode(found, byte_level(template), data)
    for chosen in (data, section()):
        ids, reference = generation_prompt(found, byte_level(template), chosen)
        assert (ids, reference) == (unsupervised_prefix(row), "Fine thanks")


def test_is_the_prompt_of_inference():
    tokenizer = metaspace(styles.MISTRAL_V3)
    messages = [system("help"), *TWO_TURNS]
    ids, _ = generation_prompt(example(messages=messages), tokenizer, section())
    assert ids == tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)


def test_turns_that_are_not_trained_are_not_asked_for():
    messages = [*TWO_TURNS, user("Bye"), assistant("", train=None), user("Bye"), assistant("Bye", train=False)]
    assert generation_prompt(example(messages=messages), byte_level(styles.CHATML), section())[1] == "Fine thanks"


@pytest.mark.parametrize("template", ["{prompt}\n", "{prompt} ", "alpaca"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_plain_prompts(template, adds_bos):
    data = section(format="prompt_completion", template=template)
    tokenizer = metaspace(styles.MISTRAL_V1, adds_bos=adds_bos)
    found = example(data, prompt="Hi", completion="Hello there")
    (row,) = encode(found, tokenizer, data)
    ids, reference = generation_prompt(found, tokenizer, data)
    assert (ids, reference) == (unsupervised_prefix(row), "Hello there")
    assert (ids[0] == tokenizer.bos_token_id) == adds_bos


def test_answer_of_a_tool_call_is_what_the_template_writes():
    call = assistant(None, tool_calls=[{"name": "help", "arguments": {}}])
    _, reference = generation_prompt(example(messages=[user("Hi"), call]), byte_level(styles.LLAMA3), section())
    assert reference == '{"name": "help", "parameters": {}}<|eom_id|>'


def test_rows_without_an_answer():
    good, none, empty = (example(messages=m) for m in (ONE_TURN, [user("Hi")], [user("Hi"), assistant("")]))
    tokenizer = byte_level(styles.CHATML)
    with pytest.raises(DataError, match=r"^rows.jsonl:1: expected a row with an answer"):
        generation_prompt(none, tokenizer, section())
    assert generation_prompts([none, good, empty], tokenizer, section()) == [
        generation_prompt(good, tokenizer, section())
    ]
    data = section(format="text")
    assert generation_prompts([example(data, text="Hi")], tokenizer, data) == []
