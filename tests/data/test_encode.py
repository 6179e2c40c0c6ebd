"""Text to tokens: boundaries, BOS, EOS, truncation; and properties that must hold for any text."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftctl.data.encode import encode
from peftctl.data.preview import preview
from tests.data import styles
from tests.data.rows import (
    ONE_TURN,
    TWO_TURNS,
    assistant,
    example,
    one_line,
    readable,
    section,
    trained,
    user,
)
from tests.data.styles import byte_level, metaspace
from tests.tiny import tiny_tokenizer

PLAIN = {"format": "prompt_completion", "template": "{prompt}\n"}


def plain(prompt: str, completion: str, tokenizer, **keys):
    data = section(**{**PLAIN, **keys})
    (row,) = encode(example(data, prompt=prompt, completion=completion), tokenizer, data)
    return row


def test_plain_template_ends_with_eos():
    tokenizer = byte_level(styles.CHATML)
    assert readable(plain("Hi there", "Hello you", tokenizer), tokenizer) == (
        "Hi:8 Ġthere:28 Ċ:1 Hello:9* Ġyou:31* <|im_end|>:42*"
    )


def test_bos_is_written_iff_the_tokenizer_writes_it():
    tokenizer = metaspace(styles.MISTRAL_V1, adds_bos=True)
    assert readable(plain("Hi", "Hello", tokenizer), tokenizer) == "<s>:40 ▁Hi:26 Ċ:1 Hello:9* </s>:41*"
    tokenizer = metaspace(styles.MISTRAL_V1)
    assert readable(plain("Hi", "Hello", tokenizer), tokenizer) == "▁Hi:26 Ċ:1 Hello:9* </s>:41*"


def test_bos_and_eos_in_the_text_are_not_doubled():
    tokenizer = metaspace(styles.MISTRAL_V1, adds_bos=True)
    row = plain("<s>Hi", "Hello</s>", tokenizer)
    assert readable(row, tokenizer) == "<s>:40 Hi:8 Ċ:1 Hello:9* </s>:41*"


@pytest.mark.parametrize("adds_bos", [True, False])
def test_chat_templates_write_bos_themselves(adds_bos):
    tokenizer = byte_level(styles.LLAMA3, adds_bos=adds_bos)
    (row,) = encode(example(messages=ONE_TURN), tokenizer, section())
    assert row.input_ids.count(tokenizer.bos_token_id) == 1


def test_text_is_trained_whole():
    data = section(format="text")
    tokenizer = metaspace(styles.MISTRAL_V1, adds_bos=True)
    (row,) = encode(example(data, text="Hi there"), tokenizer, data)
    assert readable(row, tokenizer) == "<s>:40 ▁Hi:26* ▁there:28* </s>:41*"
    (blank,) = encode(example(data, text=" \n"), tokenizer, data)
    assert blank.dropped_reason == "empty text"


def test_loss_on_all_trains_plain_prompts():
    tokenizer = byte_level(styles.CHATML)
    row = plain("Hi", "Hello", tokenizer, loss_on="all")
    assert trained(row) == row.input_ids == [8, 1, 9, 42]  # Hi Ċ Hello <|im_end|>


def test_alpaca_template():
    data = section(format="alpaca", template="alpaca")
    tokenizer = byte_level(styles.CHATML)
    (row,) = encode(example(data, instruction="Hi", input="", output="Hello"), tokenizer, data)
    assert tokenizer.decode(row.input_ids) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nHi\n\n### Response:\nHello<|im_end|>"
    )
    assert trained(row) == [9, 42]


class TestBoundaryInsideAToken:
    """Where prompt and answer would share a token, the prompt keeps the ids that generation starts from."""

    @pytest.mark.parametrize("trim", [False, True])
    def test_byte_level(self, trim):
        tokenizer = byte_level(styles.CHATML, trim_offsets=trim)
        assert tokenizer("Hi: Hello").input_ids[-1] == 27  # a whole text has _Hello
        row = plain("Hi", "Hello there", tokenizer, template="{prompt} ")
        assert readable(row, tokenizer) == "Hi:8 Ġ:3 Hello:9* Ġthere:28* <|im_end|>:42*"

    @pytest.mark.parametrize("legacy", [False, True])
    def test_sentencepiece_does_not_mark_the_answer_as_the_beginning_of_text(self, legacy):
        tokenizer = metaspace(styles.MISTRAL_V1, legacy=legacy)
        row = plain("Hi", "Hello there", tokenizer, template="{prompt} ")
        assert readable(row, tokenizer) == "▁Hi:26 ▁:3 Hello:9* ▁there:28* </s>:41*"
        assert tokenizer.decode(row.input_ids) == "Hi Hello there</s>"

    def test_newlines_that_would_merge(self):
        tokenizer = byte_level(styles.CHATML)
        (row,) = encode(example(messages=[user("Hi"), assistant("\nHello")]), tokenizer, section())
        assert readable(row, tokenizer) == one_line("""
            <|im_start|>:41 user:4 Ċ:1 Hi:8 <|im_end|>:42 Ċ:1
            <|im_start|>:41 assistant:5 Ċ:1 Ċ:1* Hello:9* <|im_end|>:42* Ċ:1""")

    def test_special_token_that_swallows_the_white_space_of_the_answer(self):
        tokenizer = byte_level(styles.PHI3)
        (row,) = encode(example(messages=[user("Hi"), assistant("\nHello")]), tokenizer, section())
        assert readable(row, tokenizer) == (
            "<|user|>:43 Hi:8 <|end|>:42 <|assistant|>:44 Ċ:1* Hello:9* <|end|>:42* <|endoftext|>:41"
        )

    def test_later_prompts_hold_the_answer_uncut(self):
        tokenizer = byte_level(styles.CHATML)
        messages = [user("Hi"), assistant("\nHello"), user("How"), assistant("Fine")]
        first, second = encode(example(messages=messages), tokenizer, section())
        assert readable(first, tokenizer) == one_line("""
            <|im_start|>:41 user:4 Ċ:1 Hi:8 <|im_end|>:42 Ċ:1
            <|im_start|>:41 assistant:5 Ċ:1 Ċ:1* Hello:9* <|im_end|>:42*""")
        assert readable(second, tokenizer) == one_line("""
            <|im_start|>:41 user:4 Ċ:1 Hi:8 <|im_end|>:42 Ċ:1
            <|im_start|>:41 assistant:5 ĊĊ:2 Hello:9 <|im_end|>:42 Ċ:1
            <|im_start|>:41 user:4 Ċ:1 How:11 <|im_end|>:42 Ċ:1
            <|im_start|>:41 assistant:5 Ċ:1 Fine:14* <|im_end|>:42* Ċ:1""")


def test_space_that_offsets_leave_out_at_the_end_of_an_answer():
    tokenizer = byte_level(styles.CHATML, trim_offsets=True)
    row = plain("Hi", "Hello ", tokenizer)
    assert readable(row, tokenizer) == "Hi:8 Ċ:1 Hello:9* Ġ:3* <|im_end|>:42*"


def test_tokenizer_without_offsets():
    tokenizer = _letters()
    (row,) = encode(example(messages=TWO_TURNS), tokenizer, section())
    assert tokenizer.decode(row.input_ids) == tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)
    assert tokenizer.decode(trained(row)) == "Hello</s>Fine thanks</s>"
    prompt = tokenizer.apply_chat_template(TWO_TURNS[:1], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    assert row.input_ids[: len(ids)] == ids


def test_pad_as_eos_still_trains_eos():
    tokenizer = metaspace.__wrapped__(styles.GEMMA, adds_bos=True)
    tokenizer.pad_token = tokenizer.eos_token
    row = plain("Hi", "Hello", tokenizer)
    assert row.labels[-1] == tokenizer.pad_token_id == 41


class TestTruncation:
    # ChatML: 10 tokens of prompt, Hello <|im_end|> Ċ
    def one(self, max_length):
        data = section(max_length=max_length)
        (row,) = encode(example(messages=ONE_TURN), byte_level(styles.CHATML), data)
        return row

    def test_whole_answer_fits(self):
        assert (len(self.one(13).input_ids), self.one(13).truncated, self.one(13).dropped_reason) == (13, False, None)

    def test_losing_what_is_not_trained_is_no_loss(self):
        assert (len(self.one(12).input_ids), self.one(12).truncated, self.one(12).dropped_reason) == (12, False, None)

    def test_cut_answer_is_said(self):
        row = self.one(11)
        assert (trained(row), row.truncated, row.dropped_reason) == ([9], True, None)

    @pytest.mark.parametrize("max_length", [1, 5, 10])
    def test_no_answer_left_is_dropped(self, max_length):
        row = self.one(max_length)
        assert (len(row.input_ids), row.truncated) == (max_length, True)
        assert row.dropped_reason == "prompt longer than max_length"

    def test_first_token_can_not_be_predicted(self):
        data = section(format="text", max_length=1)
        (row,) = encode(example(data, text="Hi there"), byte_level(styles.CHATML), data)
        assert row.dropped_reason == "prompt longer than max_length"


def test_rows_of_a_hundred_thousand_characters():
    tokenizer = tiny_tokenizer()
    long = "word " * 20_000
    rows = encode(example(messages=[user(long), assistant("short")]), tokenizer, section(max_length=64))
    assert [row.dropped_reason for row in rows] == ["prompt longer than max_length"]
    (row,) = encode(example(messages=[user("short"), assistant("x" * 100_000)]), tokenizer, section(max_length=64))
    assert row.truncated and len(row.input_ids) == 64


# Any text but the characters that special tokens are written with; spaces and newlines often.
TEXTS = st.text(
    st.sampled_from(" \n\taeiHl.,{}\\é漢😀́\u2028") | st.characters(exclude_categories=["Cs"]), max_size=12
).filter(lambda text: "<" not in text)
ANSWERS = TEXTS.filter(lambda text: text.strip())
CONVERSATIONS = st.lists(st.tuples(TEXTS, ANSWERS, st.booleans()), min_size=1, max_size=3)
TOKENIZERS = {
    "byte-level BPE": lambda: tiny_tokenizer(styles.CHATML),
    "byte-level": lambda: byte_level(styles.CHATML),
    "byte-level, trimmed offsets": lambda: byte_level(styles.CHATML, trim_offsets=True),
    "without offsets": lambda: _letters(),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(turns=CONVERSATIONS)
def test_supervised_text_is_the_answers_with_their_end_tokens(name, turns):
    tokenizer = TOKENIZERS[name]()
    end = tokenizer.eos_token
    messages = [m for q, a, flag in turns for m in (user(q), assistant(a, train=flag))]
    rows = encode(example(messages=messages), tokenizer, section(max_length=10_000))
    if not any(flag for _, _, flag in turns):
        assert [row.dropped_reason for row in rows] == ["every assistant turn has train: false"]
        return
    written = tokenizer.apply_chat_template(messages, tokenize=False)
    shown = [preview(row, tokenizer) for row in rows]
    assert sorted(text for pieces in shown for text, on in pieces if on) == sorted(a + end for _, a, f in turns if f)
    assert all(written.startswith("".join(text for text, _ in pieces)) for pieces in shown)
    assert not any(row.truncated for row in rows)


STYLES = [
    styles.LLAMA3, styles.CHATML_DEFAULT_SYSTEM, styles.MISTRAL_V1, styles.MISTRAL_V3, styles.LLAMA2, styles.GEMMA,
    styles.QWEN3, styles.PHI3, styles.ZEPHYR, styles.HARMONY, styles.NO_TOKENS,
]  # fmt: skip


@pytest.mark.parametrize("tools", [None, [{"name": "help"}]])
@settings(max_examples=80, deadline=None)
@given(turns=CONVERSATIONS, template=st.sampled_from(STYLES), build=st.sampled_from([byte_level, metaspace]))
def test_every_answer_stands_behind_the_ids_of_inference(tools, turns, template, build):
    tokenizer = build(template)
    messages = [m for question, answer, _ in turns for m in (user(question), assistant(answer))]
    rows = encode(example(messages=messages, tools=tools), tokenizer, section(max_length=10_000))
    found = [
        row.input_ids[:i]
        for row in rows
        for i in range(1, len(row.labels))
        if row.labels[i - 1] == -100 and row.labels[i] != -100
    ]
    expected = [
        tokenizer.apply_chat_template(messages[:i], tools=tools, add_generation_prompt=True, return_dict=False)
        for i in range(1, len(messages), 2)
    ]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(
    prompt=TEXTS, completion=ANSWERS, template=st.sampled_from(["{prompt}", "{prompt} ", "{prompt}\n", "Q{prompt}:"])
)
def test_plain_prompts_are_tokenised_as_inference_does(name, prompt, completion, template):
    tokenizer = TOKENIZERS[name]()
    row = plain(prompt, completion, tokenizer, template=template, max_length=10_000)
    ids = tokenizer(template.format(prompt=prompt), add_special_tokens=False).input_ids
    assert row.input_ids[: len(ids)] == ids
    assert row.labels[: len(ids)] == [-100] * len(ids)
    assert trained(row) == row.input_ids[len(ids) :]
    assert tokenizer.decode(trained(row)) == completion + tokenizer.eos_token


@cache
def _letters():
    """Tokenizer in Python, without offsets: every character is a token, behind the ids of the special tokens."""
    from transformers import PreTrainedTokenizer

    class Letters(PreTrainedTokenizer):
        vocab_size = 0x110000 + 10

        def get_vocab(self):
            return {}

        def _tokenize(self, text, **kwargs):
            return list(text)

        def _convert_token_to_id(self, token):
            return ord(token) + 10

        def _convert_id_to_token(self, index):
            return chr(index - 10)

        def convert_tokens_to_string(self, tokens):
            return "".join(tokens)

    tokenizer = Letters(bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = styles.ZEPHYR
    return tokenizer
