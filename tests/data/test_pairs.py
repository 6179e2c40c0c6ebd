"""Rows of an encoder-decoder: what the encoder reads, what the decoder writes."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from peftctl.data.cache import cache_file
from peftctl.data.collate import Collator
from peftctl.data.dataset import encode_all
from peftctl.data.encode import EncodedRow, encode
from peftctl.data.pairs import PairEncoder
from peftctl.data.preview import preview
from peftctl.data.prompts import generation_prompt, generation_prompts
from peftctl.errors import DataError
from tests.data import styles
from tests.data.rows import ONE_TURN, TWO_TURNS, assistant, example, section, user
from tests.data.styles import byte_level
from tests.tiny import tiny_tokenizer

PLAIN = {"format": "prompt_completion", "template": "{prompt}"}
BOS, EOS = 0, 2


@cache
def wrapping(single: str):
    """A tokenizer with rules for special tokens: `$A <|im_end|>` is T5's, with BOS before it BART's."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer.__wrapped__(None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<|endoftext|>", BOS), ("<|im_end|>", EOS)]
    )
    return tokenizer


T5, BART, BARE = "$A <|im_end|>", "<|endoftext|> $A <|im_end|>", "$A"


def words(text: str) -> list[int]:
    return tiny_tokenizer(None)(text).input_ids


def pair(tokenizer, prompt, completion, **keys):
    data = section(**{**PLAIN, **keys})
    (row,) = PairEncoder(tokenizer, data).encode(example(data, prompt=prompt, completion=completion))
    return row


@pytest.mark.parametrize(
    ("single", "before", "behind"), [(T5, [], [EOS]), (BART, [BOS], [EOS]), (BARE, [], [])], ids=["t5", "bart", "bare"]
)
def test_both_sides_get_the_tokenizers_special_tokens_and_the_target_one_eos(single, before, behind):
    row = pair(wrapping(single), "answer the question", "seven")
    assert row.input_ids == [*before, *words("answer the question"), *behind]
    assert row.labels == [*before, *words("seven"), EOS]
    assert (row.paired, row.truncated, row.prompt_cut, row.dropped_reason) == (True, False, False, None)
    assert (row.tokens, row.supervised) == (len(row.input_ids) + len(row.labels), len(row.labels))


def test_a_prompt_and_an_answer_as_long_as_each_other():
    row = pair(wrapping(T5), "seven", "seven")
    assert row.input_ids == row.labels and row.supervised == len(row.labels)


def test_alpaca_and_own_templates_make_the_encoders_text():
    data = section(format="alpaca", template="alpaca")
    found = example(data, instruction="answer", input="a number", output="7")
    (row,) = PairEncoder(wrapping(T5), data).encode(found)
    assert row.input_ids == [*words(found.prompt), EOS] and "### Input:\na number" in found.prompt
    row = pair(wrapping(T5), "seven", "7", template="answer {prompt} please")
    assert row.input_ids == [*words("answer seven please"), EOS]


@pytest.mark.parametrize(("single", "closing"), [(T5, [EOS]), (BARE, [])], ids=["t5", "bare"])
def test_either_side_is_cut_to_max_length(single, closing):
    whole = words("answer the question with one word")
    row = pair(wrapping(single), "answer the question with one word", "seven", max_length=4)
    assert row.input_ids == whole[: 4 - len(closing)] + closing
    assert row.prompt_cut
    row = pair(wrapping(single), "seven", "answer the question with one word", max_length=8)
    assert row.labels == whole[:8] and row.truncated and EOS not in row.labels
    exact = len(words("seven")) + 1
    row = pair(wrapping(single), "seven", "seven", max_length=exact)
    assert not row.truncated and not row.prompt_cut and row.labels[-1] == EOS


@pytest.mark.parametrize(
    ("prompt", "completion", "reason"), [("Hi", " ", "empty answer"), ("", "seven", "empty prompt")]
)
def test_rows_with_a_side_missing_are_dropped(prompt, completion, reason):
    assert pair(wrapping(BARE), prompt, completion).dropped_reason == reason


def test_every_turn_of_a_conversation_is_a_row_behind_the_prompt_of_inference():
    tokenizer = byte_level(styles.CHATML)
    rows = PairEncoder(tokenizer, section()).encode(example(messages=TWO_TURNS))
    prompts = [
        tokenizer.apply_chat_template(TWO_TURNS[:i], add_generation_prompt=True, return_dict=False) for i in (1, 3)
    ]
    assert [row.input_ids for row in rows] == prompts
    ends = [tokenizer("Hello<|im_end|>").input_ids, tokenizer("Fine thanks<|im_end|>").input_ids]
    assert [row.labels for row in rows] == ends
    (last,) = PairEncoder(tokenizer, section(loss_on="last_turn")).encode(example(messages=TWO_TURNS))
    assert last == rows[1]


def test_turns_that_are_not_trained_on():
    tokenizer = byte_level(styles.CHATML)
    messages = [user("Hi"), assistant("Hello", train=False), user("How"), assistant(" "), user("are"), assistant("Bye")]
    rows = PairEncoder(tokenizer, section()).encode(example(messages=messages))
    assert [row.dropped_reason for row in rows] == [None, "empty answer"]
    assert rows[0].labels == tokenizer("Bye<|im_end|>").input_ids


def test_a_template_without_an_end_token_gets_eos():
    tokenizer = byte_level(styles.NO_TOKENS)
    (row,) = PairEncoder(tokenizer, section()).encode(example(messages=ONE_TURN))
    assert row.labels[-1] == tokenizer.eos_token_id and row.labels.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"loss_on": "all", **PLAIN}, "data.loss_on: all leaves no prompt for the encoder of a seq2seq_lm"),
        ({"format": "text"}, "data.format: text has no prompt for the encoder"),
        ({"format": "prompt_completion"}, 'data.template: chat needs .* set it to alpaca or to a "{...}" string'),
    ],
)
def test_what_has_no_prompt_is_refused(keys, message):
    with pytest.raises(DataError, match=message):
        PairEncoder(tiny_tokenizer(None), section(**keys))


@pytest.mark.parametrize("max_length", [400, 5])
def test_generation_starts_from_what_the_encoder_was_trained_on(max_length):
    data = section(**PLAIN, max_length=max_length)
    rows = [example(data, prompt=p, completion=c) for p, c in (("answer the question", "7"), ("Hi", " "))]
    row = PairEncoder(wrapping(T5), data).encode(rows[0])[0]
    assert generation_prompts(rows, wrapping(T5), data, "seq2seq_lm") == [(row.input_ids, "7")]
    tokenizer = byte_level(styles.CHATML)
    data = section(max_length=max_length)
    row = PairEncoder(tokenizer, data).encode(example(messages=TWO_TURNS))[-1]
    found = generation_prompt(example(messages=TWO_TURNS), tokenizer, data, "seq2seq_lm")
    assert found == (row.input_ids, "Fine thanks")
    with pytest.raises(DataError, match="this one has none"):
        generation_prompt(example(messages=[user("Hi")]), tokenizer, data, "seq2seq_lm")


def many(rows, cache=None, **keys):
    data = section(**{**PLAIN, "max_dropped": 1.0, **keys})
    examples = [example(data, prompt=prompt, completion=completion) for prompt, completion in rows]
    return encode_all(examples, wrapping(T5), data, cache, "seq2seq_lm")


def test_the_report_counts_both_sides():
    rows, report = many([("answer the question", "seven"), ("Hi", "a number"), ("Hi", "")], max_length=5)
    assert report.tokens == sum(len(row.input_ids) + len(row.labels) for row in rows)
    assert report.supervised_tokens == sum(len(row.labels) for row in rows)
    assert (report.rows, report.kept, report.split_conversations) == (3, 2, 0)
    cut = sum(len(words(text)) + 1 > 5 for text in ("answer the question", "Hi"))
    assert report.cut_prompts == cut == 1
    assert ["prompts cut by max_length", "1"] in report.lines()
    assert "data: 1 prompts are cut by data.max_length: raise it or shorten them" in list(report.warnings())
    assert not any("prompts cut" in name for name, _ in many([("Hi", "7")])[1].lines())


def test_turns_of_one_conversation_are_not_called_split():
    data = section()
    _, report = encode_all([example(messages=TWO_TURNS)], byte_level(styles.CHATML), data, task="seq2seq_lm")
    assert (report.rows, report.split_conversations) == (2, 0)


def test_the_cache_gives_the_same_rows_and_knows_the_task(tmp_path):
    rows = [("answer the question with one word", "seven"), ("Hi", "answer the question"), ("Hi", "")]
    first = many(rows, tmp_path, max_length=4)
    assert many(rows, tmp_path, max_length=4) == first == many(rows, max_length=4)
    assert any(row.prompt_cut for row in first[0]) and any(row.truncated for row in first[0])
    tokenizer, data = wrapping(T5), section(**PLAIN)
    files = {cache_file(tmp_path, [], tokenizer, data, task) for task in ("seq2seq_lm", "causal_lm")}
    assert len(files) == 2


def test_sides_are_padded_apart():
    rows = [EncodedRow([5, 6, 7, 2], [8, 2], "x:1", paired=True), EncodedRow([9, 2], [5, 6, 2], "x:2", paired=True)]
    batch = Collator(tiny_tokenizer())(rows)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7, 2], [9, 2, 3, 3]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]],
        "labels": [[8, 2, -100], [5, 6, 2]],
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in Collator(tiny_tokenizer(), 8)(rows).items()}
    assert shapes == dict.fromkeys(("input_ids", "attention_mask", "labels"), (2, 8))
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_the_preview_shows_both_texts():
    row = pair(wrapping(T5), "answer the question", "seven")
    assert preview(row, wrapping(T5)) == [("answer the question<|im_end|>\n", False), ("seven<|im_end|>", True)]
    assert preview(EncodedRow([], [], "x:1", dropped_reason="empty answer", paired=True), wrapping(T5)) == []


def test_causal_rows_are_not_pairs():
    (row,) = encode(example(messages=ONE_TURN), byte_level(styles.CHATML), section())
    assert not row.paired and row.tokens == len(row.input_ids)
    assert row.supervised == sum(label != -100 for label in row.labels[1:])
