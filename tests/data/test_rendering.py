"""Token ids and masks, checked by hand, for templates in the styles of well-known models.

Ids can be read off `styles.FIRST`, `WORDS` and `SPECIALS`; a star marks a token that is trained on.
"""

from __future__ import annotations

import pytest

from peftctl.data.encode import encode
from peftctl.data.preview import preview
from peftctl.errors import DataError
from tests.data import styles
from tests.data.rows import (
    ONE_TURN,
    TWO_TURNS,
    assistant,
    example,
    one_line,
    readable,
    section,
    system,
    tool,
    trained,
    user,
)
from tests.data.styles import byte_level, metaspace

HAND_CHECKED = {
    "llama3": (
        byte_level(styles.LLAMA3),
        ["""<|begin_of_text|>:40
            <|start_header_id|>:41 user:4 <|end_header_id|>:42 ĊĊ:2 Hi:8 Ġthere:28 <|eot_id|>:43
            <|start_header_id|>:41 assistant:5 <|end_header_id|>:42 ĊĊ:2 Hello:9* <|eot_id|>:43*
            <|start_header_id|>:41 user:4 <|end_header_id|>:42 ĊĊ:2 How:11 Ġare:30 Ġyou:31 <|eot_id|>:43
            <|start_header_id|>:41 assistant:5 <|end_header_id|>:42 ĊĊ:2 Fine:14* Ġthanks:33* <|eot_id|>:43*"""],
    ),
    "chatml": (
        byte_level(styles.CHATML),
        ["""<|im_start|>:41 user:4 Ċ:1 Hi:8 Ġthere:28 <|im_end|>:42 Ċ:1
            <|im_start|>:41 assistant:5 Ċ:1 Hello:9* <|im_end|>:42* Ċ:1
            <|im_start|>:41 user:4 Ċ:1 How:11 Ġare:30 Ġyou:31 <|im_end|>:42 Ċ:1
            <|im_start|>:41 assistant:5 Ċ:1 Fine:14* Ġthanks:33* <|im_end|>:42* Ċ:1"""],
    ),
    "chatml with a default system message": (
        byte_level(styles.CHATML_DEFAULT_SYSTEM),
        ["""<|im_start|>:41 system:6 Ċ:1 help:17 <|im_end|>:42 Ċ:1
            <|im_start|>:41 user:4 Ċ:1 Hi:8 Ġthere:28 <|im_end|>:42 Ċ:1
            <|im_start|>:41 assistant:5 Ċ:1 Hello:9* <|im_end|>:42* Ċ:1
            <|im_start|>:41 user:4 Ċ:1 How:11 Ġare:30 Ġyou:31 <|im_end|>:42 Ċ:1
            <|im_start|>:41 assistant:5 Ċ:1 Fine:14* Ġthanks:33* <|im_end|>:42* Ċ:1"""],
    ),
    "mistral v1": (
        metaspace(styles.MISTRAL_V1),
        ["""<s>:40 [INST]:18 ▁Hi:26 ▁there:28 ▁[/INST]:37 ▁Hello:27* </s>:41*
            [INST]:18 ▁How:29 ▁are:30 ▁you:31 ▁[/INST]:37 ▁Fine:32* ▁thanks:33* </s>:41*"""],
    ),
    "mistral v3": (
        metaspace(styles.MISTRAL_V3),
        ["""<s>:40 [INST]:42 ▁Hi:26 ▁there:28 [/INST]:43 ▁Hello:27* </s>:41*
            [INST]:42 ▁How:29 ▁are:30 ▁you:31 [/INST]:43 ▁Fine:32* ▁thanks:33* </s>:41*"""],
    ),
    "gemma": (
        metaspace(styles.GEMMA),
        ["""<bos>:40 <start_of_turn>:42 user:4 Ċ:1 Hi:8 ▁there:28 <end_of_turn>:43 Ċ:1
            <start_of_turn>:42 model:7 Ċ:1 Hello:9* <end_of_turn>:43* Ċ:1
            <start_of_turn>:42 user:4 Ċ:1 How:11 ▁are:30 ▁you:31 <end_of_turn>:43 Ċ:1
            <start_of_turn>:42 model:7 Ċ:1 Fine:14* ▁thanks:33* <end_of_turn>:43* Ċ:1"""],
    ),
    "llama2, a space before the end token, a BOS a turn": (
        metaspace(styles.LLAMA2),
        ["""<s>:40 [INST]:18 ▁Hi:26 ▁there:28 ▁[/INST]:37 ▁Hello:27* ▁:3* </s>:41*
            <s>:40 [INST]:18 ▁How:29 ▁are:30 ▁you:31 ▁[/INST]:37 ▁Fine:32* ▁thanks:33* ▁:3* </s>:41*"""],
    ),
    "phi3, tokens that swallow newlines, a second token after the last turn": (
        byte_level(styles.PHI3),
        ["""<|user|>:43 Hi:8 Ġthere:28 <|end|>:42 <|assistant|>:44 Hello:9* <|end|>:42*
            <|user|>:43 How:11 Ġare:30 Ġyou:31 <|end|>:42 <|assistant|>:44 Fine:14* Ġthanks:33* <|end|>:42*
            <|endoftext|>:41"""],
    ),
    "qwen3, thoughts only behind the last question": (
        byte_level(styles.QWEN3),
        ["""<|im_start|>:41 user:4 Ċ:1 Hi:8 Ġthere:28 <|im_end|>:42 Ċ:1
            <|im_start|>:41 assistant:5 Ċ:1 <think>:20* ĊĊ:2* </think>:21* ĊĊ:2* Hello:9* <|im_end|>:42* Ċ:1""",
         """<|im_start|>:41 user:4 Ċ:1 Hi:8 Ġthere:28 <|im_end|>:42 Ċ:1
            <|im_start|>:41 assistant:5 Ċ:1 Hello:9 <|im_end|>:42 Ċ:1
            <|im_start|>:41 user:4 Ċ:1 How:11 Ġare:30 Ġyou:31 <|im_end|>:42 Ċ:1
            <|im_start|>:41 assistant:5 Ċ:1
            <think>:20* ĊĊ:2* </think>:21* ĊĊ:2* Fine:14* Ġthanks:33* <|im_end|>:42* Ċ:1"""],
    ),
    "r1, the generation prompt opens a thought": (
        byte_level(styles.R1),
        ["""<begin>:40 <|User|>:42 Hi:8 Ġthere:28 <|Assistant|>:43 Hello:9* <eos>:41*
            <|User|>:42 How:11 Ġare:30 Ġyou:31 <|Assistant|>:43 Fine:14* Ġthanks:33* <eos>:41*"""],
    ),
    "no special token, EOS appended and each turn in a row of its own": (
        metaspace(styles.NO_TOKENS),
        ["""▁user:22 ::67 ▁Hi:26 ▁there:28 Ċ:1 assistant:5 ::67 ▁Hello:27* </s>:41*""",
         """▁user:22 ::67 ▁Hi:26 ▁there:28 Ċ:1 assistant:5 ::67 ▁Hello:27 Ċ:1
            user:4 ::67 ▁How:29 ▁are:30 ▁you:31 Ċ:1 assistant:5 ::67 ▁Fine:32* ▁thanks:33* </s>:41*"""],
    ),
}  # fmt: skip


@pytest.mark.parametrize("style", HAND_CHECKED)
def test_two_turns(style):
    tokenizer, expected = HAND_CHECKED[style]
    rows = encode(example(messages=TWO_TURNS), tokenizer, section())
    assert [readable(row, tokenizer) for row in rows] == [one_line(text) for text in expected]


def test_ids_above_are_what_the_vocabulary_says():
    pieces = [*styles.FIRST, *styles.WORDS, *(" " + word for word in styles.WORDS)]
    assert [pieces[i] for i in (1, 4, 8, 9, 28, 33)] == ["\n", "user", "Hi", "Hello", " there", " thanks"]
    assert styles.FIRST_SPECIAL == 40


def test_zephyr_header_is_text_and_end_is_eos():
    tokenizer = byte_level(styles.ZEPHYR)
    (row,) = encode(example(messages=TWO_TURNS), tokenizer, section())
    assert tokenizer.decode(row.input_ids) == (
        "<|user|>\nHi there</s>\n<|assistant|>\nHello</s>\n<|user|>\nHow are you</s>\n<|assistant|>\nFine thanks</s>\n"
    )
    assert readable(row, tokenizer).count("*") == 5
    assert trained(row) == [9, 41, 14, 33, 41]  # Hello </s> Fine _thanks </s>


@pytest.mark.parametrize("build", [byte_level, metaspace])
@pytest.mark.parametrize(
    ("loss_on", "flags"), [("completion", {}), ("completion", {"train": False}), ("last_turn", {}), ("all", {})]
)
def test_generation_marks_change_nothing(build, loss_on, flags):
    messages = [system("help"), user("Hi there"), assistant("Hello", **flags), *TWO_TURNS[2:]]
    plain, marked = (
        encode(example(messages=messages), build(template), section(loss_on=loss_on))
        for template in (styles.CHATML, styles.CHATML_MARKED)
    )
    assert plain == marked


def test_row_is_what_the_template_writes():
    for template in (styles.LLAMA3, styles.CHATML, styles.GEMMA, styles.PHI3):
        tokenizer = byte_level(template)
        (row,) = encode(example(messages=TWO_TURNS), tokenizer, section())
        assert row.input_ids == tokenizer.apply_chat_template(TWO_TURNS, return_dict=False)


def test_template_without_generation_prompt_does_not_train_its_header():
    with_prompt, without = (
        encode(example(messages=TWO_TURNS), byte_level(template), section())
        for template in (styles.CHATML, styles.CHATML_BARE)
    )
    assert without == with_prompt


def test_last_answer_with_an_end_of_its_own_is_not_learnt_for_earlier_ones():
    tokenizer = byte_level(styles.HARMONY)
    rows = encode(example(messages=TWO_TURNS), tokenizer, section())
    assert [tokenizer.decode(trained(row)) for row in rows] == [
        "<|channel|>final<|message|>Hello<|return|>",
        "<|channel|>final<|message|>Fine thanks<|return|>",
    ]
    assert "Hello<|end|>" in tokenizer.decode(rows[1].input_ids)


def test_system_message_that_inference_shows_is_in_every_row():
    """The template writes it only if the user spoke last: rendering a whole conversation would train without it."""
    tokenizer = metaspace(styles.MISTRAL_V3)
    rows = encode(example(messages=[system("help"), *TWO_TURNS]), tokenizer, section())
    assert [readable(row, tokenizer) for row in rows] == [
        "<s>:40 [INST]:42 ▁help:35 ĊĊ:2 Hi:8 ▁there:28 [/INST]:43 ▁Hello:27* </s>:41*",
        "<s>:40 [INST]:42 ▁Hi:26 ▁there:28 [/INST]:43 ▁Hello:27 </s>:41 "
        "[INST]:42 ▁help:35 ĊĊ:2 How:11 ▁are:30 ▁you:31 [/INST]:43 ▁Fine:32* ▁thanks:33* </s>:41*",
    ]


def test_tools_that_move_split_the_conversation():
    tokenizer = metaspace(styles.MISTRAL_V3)
    rows = encode(example(messages=TWO_TURNS, tools=[{"name": "help"}]), tokenizer, section())
    assert [readable(row, tokenizer) for row in rows] == [
        "<s>:40 [AVAILABLE_TOOLS]:44 ▁help:35 [/AVAILABLE_TOOLS]:45 "
        "[INST]:42 ▁Hi:26 ▁there:28 [/INST]:43 ▁Hello:27* </s>:41*",
        "<s>:40 [INST]:42 ▁Hi:26 ▁there:28 [/INST]:43 ▁Hello:27 </s>:41 "
        "[AVAILABLE_TOOLS]:44 ▁help:35 [/AVAILABLE_TOOLS]:45 "
        "[INST]:42 ▁How:29 ▁are:30 ▁you:31 [/INST]:43 ▁Fine:32* ▁thanks:33* </s>:41*",
    ]


def test_every_prompt_is_the_one_of_inference():
    tools = [{"name": "help"}]
    for template in (styles.LLAMA3, styles.MISTRAL_V3, styles.QWEN3, styles.HARMONY, styles.PHI3):
        tokenizer = byte_level(template)
        rows = encode(example(messages=TWO_TURNS, tools=tools), tokenizer, section())
        prompts = [
            tokenizer.apply_chat_template(TWO_TURNS[:i], tools=tools, add_generation_prompt=True, return_dict=False)
            for i in (1, 3)
        ]
        begins = [
            row.input_ids[:i]
            for row in rows
            for i in range(1, len(row.labels))
            if row.labels[i - 1] == -100 and row.labels[i] != -100
        ]
        assert begins == prompts


def test_tool_calls_train_up_to_their_own_end_token():
    call = assistant(None, tool_calls=[{"name": "help", "arguments": {"you": "Hi"}}])
    messages = [user("Hi"), call, tool("Fine"), assistant("Bye")]
    tokenizer = byte_level(styles.LLAMA3)
    (row,) = encode(example(messages=messages), tokenizer, section())
    assert tokenizer.decode(trained(row)) == ('{"name": "help", "parameters": {"you": "Hi"}}<|eom_id|>Bye<|eot_id|>')


def test_tool_calls_where_a_special_token_begins_the_call():
    call = assistant(None, tool_calls=[{"name": "help", "arguments": '{"you": 1}'}])
    tokenizer = metaspace(styles.MISTRAL_V3)
    (row,) = encode(example(messages=[user("Hi"), call]), tokenizer, section())
    text = tokenizer.decode(trained(row))
    assert text.startswith("[TOOL_CALLS]") and text.endswith("</s>") and '"arguments": {"you": 1}' in text
    assert text.count("</s>") == 1


def test_tool_calls_behind_text():
    call = assistant("Hello", tool_calls=[{"name": "help", "arguments": {}}])
    tokenizer = byte_level(styles.QWEN3)
    (row,) = encode(example(messages=[user("Hi"), call]), tokenizer, section())
    assert tokenizer.decode(trained(row)) == (
        '<think>\n\n</think>\n\nHello<tool_call>\n{"name": "help", "arguments": {}}\n</tool_call><|im_end|>'
    )


def test_template_that_leaves_out_tool_calls_is_refused():
    """It would train the model to answer nothing."""
    call = assistant("", tool_calls=[{"name": "help", "arguments": {}}])
    with pytest.raises(DataError, match=r"^rows.jsonl:1: the tokenizer's chat template leaves out the tool calls"):
        encode(example(messages=[user("Hi"), call]), byte_level(styles.CHATML), section())


def test_header_is_not_trained_where_the_generation_prompt_writes_it_with_other_white_space():
    """Templates written over several lines often differ in white space between the two."""
    template = (
        "{% for m in messages %}{{ '\n  <|im_start|>' + m.role + '\n  ' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = byte_level(template)
    (row,) = encode(example(messages=TWO_TURNS), tokenizer, section())
    assert [text for text, on in preview(row, tokenizer) if on] == ["  Hello<|im_end|>", "  Fine thanks<|im_end|>"]


def test_answer_does_not_begin_inside_a_special_token():
    """Generation prompt and answer part in the middle of a token's name."""
    template = (
        "{% for m in messages %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant<|channel|>' }}{% endif %}"
    )
    tokenizer = byte_level.__wrapped__(styles.HARMONY)
    tokenizer.chat_template = template
    (row,) = encode(example(messages=ONE_TURN), tokenizer, section())
    assert readable(row, tokenizer) == (
        "<|start|>:40 user:4 <|message|>:42 Hi:8 Ġthere:28 <|end|>:43 "
        "<|start|>:40 assistant:5 <|message|>:42 Hello:9* <|end|>:43*"
    )


def test_train_flags_choose_turns():
    tokenizer = byte_level(styles.CHATML)
    messages = [user("Hi"), assistant("Hello", train=False), user("How"), assistant("Fine"), user("Bye")]
    (row,) = encode(example(messages=messages), tokenizer, section())
    assert readable(row, tokenizer) == one_line("""
        <|im_start|>:41 user:4 Ċ:1 Hi:8 <|im_end|>:42 Ċ:1
        <|im_start|>:41 assistant:5 Ċ:1 Hello:9 <|im_end|>:42 Ċ:1
        <|im_start|>:41 user:4 Ċ:1 How:11 <|im_end|>:42 Ċ:1
        <|im_start|>:41 assistant:5 Ċ:1 Fine:14* <|im_end|>:42* Ċ:1""")


def test_last_turn_and_all():
    tokenizer = byte_level(styles.CHATML)
    (last,) = encode(example(messages=TWO_TURNS), tokenizer, section(loss_on="last_turn"))
    assert trained(last) == [14, 33, 42]  # Fine _thanks <|im_end|>
    (everything,) = encode(example(messages=TWO_TURNS), tokenizer, section(loss_on="all"))
    assert everything.labels == everything.input_ids == last.input_ids


def test_all_ends_with_eos_where_the_template_has_no_end_token():
    tokenizer = metaspace(styles.NO_TOKENS)
    (row,) = encode(example(messages=ONE_TURN), tokenizer, section(loss_on="all"))
    assert readable(row, tokenizer).endswith("▁Hello:27* Ċ:1* </s>:41*")


def test_flags_that_all_would_ignore_are_refused():
    messages = [user("Hi"), assistant("Hello", train=False)]
    with pytest.raises(DataError, match=r"rows.jsonl:1: train: false has no effect with data.loss_on: all"):
        encode(example(messages=messages), byte_level(styles.CHATML), section(loss_on="all"))


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([user("Hi")], "no assistant turn"),
        ([user("Hi"), assistant("Hello", train=False)], "every assistant turn has train: false"),
        ([user("Hi"), assistant("  \n")], "empty answer"),
        ([user("Hi"), assistant(None)], "empty answer"),
    ],
)
def test_rows_without_an_answer_say_why(messages, reason):
    (row,) = encode(example(messages=messages), byte_level(styles.CHATML), section())
    assert (row.dropped_reason, row.labels) == (reason, [])


def test_empty_answer_among_others_is_reported_and_the_others_are_trained():
    messages = [user("Hi"), assistant(""), user("How"), assistant("Fine")]
    good, dropped = encode(example(messages=messages), byte_level(styles.CHATML), section())
    assert trained(good) == [14, 42]  # Fine <|im_end|>
    assert dropped.dropped_reason == "empty answer"


def test_answer_may_begin_the_conversation():
    tokenizer = byte_level(styles.CHATML)
    (row,) = encode(example(messages=[assistant("Hello"), user("Hi"), assistant("Bye")]), tokenizer, section())
    assert trained(row) == [9, 42, 16, 42]


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (styles.GEMMA, [system("help"), *ONE_TURN], "System role not supported"),
        (styles.MISTRAL_V1, [user("Hi"), user("Hi"), assistant("Hello")], "Conversation roles must alternate"),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", ONE_TURN, "can only concatenate str"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", ONE_TURN, "leaves out the text of assistant messages"),
    ],
)
def test_template_that_refuses_is_quoted(template, messages, said):
    with pytest.raises(DataError, match=rf"^rows.jsonl:1: the tokenizer's chat template .*{said}"):
        encode(example(messages=messages), metaspace(template), section())


def test_tokenizer_without_template_is_one_clear_error():
    with pytest.raises(DataError, match=r"^data.template: chat needs a tokenizer with a chat template"):
        encode(example(messages=ONE_TURN), byte_level(""), section())


def test_classification_formats_are_refused():
    with pytest.raises(DataError, match="labelled_text trains a classifier"):
        encode(example(messages=ONE_TURN), byte_level(styles.CHATML), section(format="labelled_text"))


def test_answer_that_looks_like_the_template_is_not_mistaken_for_it():
    answers = ["<|im_start|>assistant\nHello", "b7f", "q3x", "assistant\n", "user"]
    tokenizer = byte_level(styles.CHATML)
    for answer in answers:
        (row,) = encode(example(messages=[user(answer), assistant(answer)]), tokenizer, section())
        assert tokenizer.decode(trained(row)) == answer + "<|im_end|>"
