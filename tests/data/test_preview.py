"""What is shown of a row."""

from __future__ import annotations

from peftctl.data.encode import EncodedRow, encode
from peftctl.data.preview import preview
from tests.data import styles
from tests.data.rows import TWO_TURNS, example, section
from tests.data.styles import byte_level, metaspace


def test_pieces_alternate_and_add_up():
    for build in (byte_level, metaspace):
        tokenizer = build(styles.CHATML)
        (row,) = encode(example(messages=TWO_TURNS), tokenizer, section())
        assert preview(row, tokenizer) == [
            ("<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n", False),
            ("Hello<|im_end|>", True),
            ("\n<|im_start|>user\nHow are you<|im_end|>\n<|im_start|>assistant\n", False),
            ("Fine thanks<|im_end|>", True),
            ("\n", False),
        ]


def test_row_cut_inside_a_character_still_adds_up():
    tokenizer = byte_level(styles.CHATML)
    ids = tokenizer("Hi é", add_special_tokens=False).input_ids
    for split in range(len(ids) + 1):
        row = EncodedRow(ids, [-100] * split + ids[split:], "x:1")
        assert "".join(text for text, _ in preview(row, tokenizer)) == "Hi é"


def test_empty_row():
    assert preview(EncodedRow([], [], "x:1", dropped_reason="empty answer"), byte_level(styles.CHATML)) == []
