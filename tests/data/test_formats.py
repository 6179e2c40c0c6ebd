"""Rows to examples, for every format, and what is said about rows that don't fit."""

from __future__ import annotations

import json

import pytest

from peftctl.data.formats import Message, to_examples
from peftctl.data.sources import Row
from peftctl.errors import DataError
from tests.data.rows import example, section


def said(fields: dict, **keys) -> str:
    with pytest.raises(DataError) as error:
        to_examples([Row(fields, "x.jsonl:17")], section(**keys))
    return str(error.value)


class TestMessages:
    def test_all_roles_and_flags(self):
        messages = [
            {"role": "developer", "content": "d"},
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "ann"},
            {"role": "assistant", "content": "c", "train": False, "reasoning_content": "r"},
            {"role": "tool", "content": "t", "tool_call_id": "1"},
        ]
        assert example(messages=messages).messages == [
            Message("developer", "d"),
            Message("system", "s"),
            Message("user", "ab", None, {"name": "ann"}),
            Message("assistant", "c", False, {"reasoning_content": "r"}),
            Message("tool", "t", None, {"tool_call_id": "1"}),
        ]

    def test_tool_calls_have_one_form(self):
        calls = [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
            {"name": "g", "arguments": {"b": None, "c": 2}},
        ]
        (message,) = example(messages=[{"role": "assistant", "content": None, "tool_calls": calls}]).messages
        assert message.content is None
        assert message.extra["tool_calls"] == [
            {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"a": 1}}},
            {"type": "function", "function": {"name": "g", "arguments": {"c": 2}}},
        ]

    def test_columnar_files_fill_rows_with_nulls(self):
        messages = [{"role": "user", "content": "a", "tool_calls": None, "train": None, "name": None}]
        assert example(messages=messages).messages == [Message("user", "a")]

    def test_structures_may_be_json_text(self):
        found = example(messages=json.dumps([{"role": "user", "content": "a"}]), tools='[{"name": "f"}]')
        assert (found.messages, found.tools) == ([Message("user", "a")], [{"name": "f"}])
        assert example(messages=[{"role": "user", "content": "a"}], tools="").tools is None

    def test_columns_rename_inside_messages_too(self):
        data = section(columns={"messages": "chat", "role": "who", "content": "says"})
        assert example(data, chat=[{"who": "user", "says": "a"}]).messages == [Message("user", "a")]

    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            ([], ": messages: expected at least one message, got an empty list"),
            ("a", ": messages: expected JSON: Expecting value at character 1"),
            ({"role": "user"}, ": messages: expected a list of objects, got an object"),
            (["a"], ": messages[0]: expected an object, got text"),
            ([{"content": "a"}], ": messages[0]: key 'role' is missing; the message has: content"),
            ([{"from": "human", "value": "a"}], "it looks like data.format: sharegpt"),
            ([{"role": "usr", "content": "a"}], ": messages[0].role: unknown role 'usr'; did you mean 'user'?"),
            ([{"role": "user"}], ": messages[0]: key 'content' is missing; the message has: role"),
            ([{"role": "user", "content": None}], ": messages[0].content: expected text, got null"),
            ([{"role": "user", "content": 5}], ": messages[0].content: expected text, got a number"),
            (
                [{"role": "user", "content": [{"type": "image"}]}],
                ': messages[0].content[0]: expected {"type": "text", "text": ...}, got image',
            ),
            ([{"role": "assistant", "content": "a", "train": 1}], ".train: expected true or false, got a number"),
            ([{"role": "user", "content": "a", "train": True}], ".train: only assistant messages can be trained on"),
            (
                [{"role": "assistant", "tool_calls": [{"x": 1}]}],
                ".tool_calls: expected calls with a function name and arguments",
            ),
        ],
    )
    def test_problems(self, messages, message):
        text = said({"messages": messages})
        assert text.startswith("x.jsonl:17: messages") and message in text

    def test_tools_must_be_objects(self):
        row = {"messages": [{"role": "user", "content": "a"}], "tools": ["f"]}
        assert said(row) == "x.jsonl:17: tools: expected a list of objects, got a list"


class TestShareGPT:
    def test_senders(self):
        data = section(format="sharegpt")
        turns = [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "b"},
            {"from": "gpt", "value": "c", "train": False},
        ]
        call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
        assert example(data, conversations=turns, system="s").messages == [
            Message("system", "s"),
            Message("user", "a"),
            Message("assistant", None, None, {"tool_calls": [call]}),
            Message("tool", "b"),
            Message("assistant", "c", False),
        ]

    @pytest.mark.parametrize(
        ("turn", "message"),
        [
            ({"from": "humn", "value": "a"}, "conversations[0].from: unknown sender 'humn'; did you mean 'human'?"),
            ({"role": "user", "content": "a"}, "it looks like data.format: messages"),
            ({"from": "human"}, "conversations[0]: key 'value' is missing; the message has: from"),
            ({"from": "function_call", "value": "f()"}, "conversations[0].value: expected JSON"),
        ],
    )
    def test_problems(self, turn, message):
        assert message in said({"conversations": [turn]}, format="sharegpt")


class TestAlpaca:
    def test_chat(self):
        data = section(format="alpaca")
        found = example(data, instruction="i", input="x", output="o", system="s")
        assert found.messages == [Message("system", "s"), Message("user", "i\n\nx"), Message("assistant", "o")]
        found = example(data, instruction="i", input="", output="o")
        assert found.messages == [Message("user", "i"), Message("assistant", "o")]
        assert example(data, instruction="i", output=None).messages[-1] == Message("assistant", "")

    def test_own_template(self):
        data = section(format="alpaca", template="Q: {instruction}{input}\nA: ")
        found = example(data, instruction="i", input=None, output="o")
        assert (found.prompt, found.completion) == ("Q: i\nA: ", "o")

    def test_template_may_not_hold_the_answer(self):
        text = said({"instruction": "i", "output": "o"}, format="alpaca", template="{instruction} {output}")
        assert text.startswith("data.template: names {output}, the answer")


class TestPromptCompletion:
    def test_chat_makes_a_turn_of_it(self):
        data = section(format="prompt_completion")
        found = example(data, prompt="p", completion="c")
        assert found.messages == [Message("user", "p"), Message("assistant", "c")]

    def test_columns_and_template(self):
        data = section(
            format="prompt_completion",
            template="{prompt} [{lang}]: ",
            columns={"prompt": "input", "completion": "target"},
        )
        found = example(data, input="p", target="c", lang="en")
        assert (found.prompt, found.completion, found.messages) == ("p [en]: ", "c", None)

    def test_alpaca_template(self):
        data = section(format="prompt_completion", template="alpaca")
        assert "### Instruction:\np\n\n### Response:\n" in example(data, prompt="p", completion="c").prompt

    def test_missing_field(self):
        row = {"input": "p", "target": "c", "prompt": "p"}
        assert said(row, format="prompt_completion") == (
            "x.jsonl:17: field 'completion' is missing; the row has: input, target, prompt; "
            "map it with data.columns {completion: ...}"
        )
        assert said(row, format="prompt_completion", columns={"completion": "answer"}) == (
            "x.jsonl:17: field 'answer' is missing (data.columns maps completion to it); "
            "the row has: input, target, prompt"
        )

    def test_wrong_types(self):
        assert said({"prompt": None, "completion": "c"}, format="prompt_completion") == (
            "x.jsonl:17: field 'prompt': expected text, got null"
        )
        assert said({"prompt": "p", "completion": 4}, format="prompt_completion") == (
            "x.jsonl:17: field 'completion': expected text, got a number"
        )


def test_text_and_classification_formats():
    assert example(section(format="text"), text="a").text == "a"
    labelled = example(section(format="labelled_text"), text="a", label=3)
    assert (labelled.text, labelled.label) == ("a", 3)
    tagged = example(section(format="tokens_tags"), tokens=["a", "b"], tags=["X", "Y"])
    assert (tagged.tokens, tagged.tags) == (["a", "b"], ["X", "Y"])


@pytest.mark.parametrize(
    ("fields", "keys", "message"),
    [
        ({"text": "a", "label": 1.5}, {"format": "labelled_text"}, "field 'label': expected text or a whole number"),
        ({"text": "a", "label": True}, {"format": "labelled_text"}, "got true or false"),
        ({"tokens": ["a"], "tags": []}, {"format": "tokens_tags"}, "got 1 tokens and 0 tags"),
        (
            {"tokens": "a b", "tags": []},
            {"format": "tokens_tags"},
            "field 'tokens': expected a list of tokens, got text",
        ),
        ({"text": "a"}, {"format": "text", "template": "alpaca"}, "format text takes no template, got 'alpaca'"),
        ({"text": "a"}, {"format": "text", "columns": {"txt": "a"}}, "data.columns.txt: format text has no such field"),
    ],
)
def test_what_does_not_fit(fields, keys, message):
    assert message in said(fields, **keys)


def test_ten_problems_are_shown_and_the_others_counted():
    rows = [Row({}, f"x.jsonl:{i}") for i in range(1, 26)]
    with pytest.raises(DataError) as error:
        to_examples(rows, section(format="text"))
    assert [problem.where for problem in error.value.problems[:10]] == [f"x.jsonl:{i}" for i in range(1, 11)]
    assert str(error.value.problems[10]) == "data: and 15 more problems like these"
    assert len(error.value.problems) == 11
