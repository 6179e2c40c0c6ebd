"""Encoded rows on disk: never stale, never trusted blindly."""

from __future__ import annotations

import json

import pytest
from safetensors.numpy import load_file, save_file

from peftctl.data import cache as cache_module
from peftctl.data import dataset
from peftctl.data.dataset import encode_all
from peftctl.data.encode import Encoder
from tests.data import styles
from tests.data.rows import ONE_TURN, TWO_TURNS, assistant, example, section, user
from tests.data.styles import byte_level


@pytest.fixture
def encoded(monkeypatch):
    """Places of the examples that were encoded, not read."""
    seen = []
    original = Encoder.encode

    def encode(self, found):
        seen.append(found.where)
        return original(self, found)

    monkeypatch.setattr(Encoder, "encode", encode)
    return seen


def run(root, conversations=(ONE_TURN, TWO_TURNS), tokenizer=None, **keys):
    data = section(max_dropped=1.0, **keys)
    examples = [example(messages=messages) for messages in conversations]
    return encode_all(examples, tokenizer or byte_level(styles.QWEN3), data, cache=root)


def files(root):
    return sorted(path for path in (root / "tokens").iterdir())


def test_second_run_reads_and_gives_the_same(tmp_path, encoded):
    conversations = (ONE_TURN, [user("Hi")], TWO_TURNS, [user("Hi " * 99), assistant("Hello")])
    first = run(tmp_path, conversations, max_length=40)
    assert len(encoded) == 4
    assert run(tmp_path, conversations, max_length=40) == first == run(None, conversations, max_length=40)
    assert len(encoded) == 8  # only the run without a cache encoded again
    assert first[1].dropped.keys() == {"no assistant turn", "prompt longer than max_length"}
    assert [file.suffix for file in files(tmp_path)] == [".safetensors"]


def test_places_come_from_the_rows_of_this_run(tmp_path, encoded):
    data = section()
    examples = [example(messages=ONE_TURN)]
    encode_all(examples, byte_level(styles.CHATML), data, cache=tmp_path)
    moved = [dataset.Example("moved.jsonl:7", messages=examples[0].messages)]
    rows, _ = encode_all(moved, byte_level(styles.CHATML), data, cache=tmp_path)
    assert [row.where for row in rows] == ["moved.jsonl:7"]
    assert len(encoded) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"conversations": (TWO_TURNS, ONE_TURN)},
        {"conversations": ([user("Hi there"), assistant("Hello", train=False)], TWO_TURNS)},
        {"conversations": ([user("Hi there", name="ann"), assistant("Hello")], TWO_TURNS)},
        {"tokenizer": byte_level(styles.CHATML)},
        {"tokenizer": byte_level(styles.QWEN3, trim_offsets=True)},
        {"loss_on": "last_turn"},
        {"max_length": 20},
    ],
)
def test_anything_that_matters_makes_a_new_file(tmp_path, change):
    assert run(tmp_path, **{"max_length": 400, **change}) == run(None, **{"max_length": 400, **change})
    run(tmp_path, max_length=400)
    assert len(files(tmp_path)) == 2


def test_what_does_not_matter_makes_none(tmp_path, encoded):
    run(tmp_path)
    run(tmp_path, packing=True, pad_to_multiple_of=8, train="elsewhere.jsonl", eval_fraction=0.5)
    assert len(files(tmp_path)) == 1
    assert len(encoded) == 2


def test_settings_that_a_call_leaves_in_the_tokenizer_do_not_count(tmp_path):
    tokenizer = byte_level.__wrapped__(styles.CHATML)
    before = cache_module.cache_file(tmp_path, [], tokenizer, section())
    tokenizer("Hi there", truncation=True, max_length=1)
    assert tokenizer.backend_tokenizer.truncation
    assert cache_module.cache_file(tmp_path, [], tokenizer, section()) == before


def test_special_tokens_of_a_tokenizer_count(tmp_path):
    tokenizer = byte_level.__wrapped__(styles.CHATML)
    run(tmp_path, tokenizer=tokenizer)
    tokenizer.add_tokens(["there"])
    run(tmp_path, tokenizer=tokenizer)
    tokenizer.eos_token = "<|endoftext|>"
    run(tmp_path, tokenizer=tokenizer)
    assert len(files(tmp_path)) == 3


def test_changed_code_makes_a_new_file(tmp_path, monkeypatch):
    run(tmp_path)
    monkeypatch.setattr(cache_module, "_CODE", ("encode.py",))
    run(tmp_path)
    assert len(files(tmp_path)) == 2


def cut(file):
    file.write_bytes(file.read_bytes()[:-8])


def flip(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def empty(file):
    file.write_bytes(b"")


def other_tensors(file):
    save_file({"ids": load_file(file)["ids"]}, file, {"reasons": json.dumps([None])})


@pytest.mark.parametrize("damage", [cut, flip, empty, other_tensors])
def test_damaged_file_is_written_anew(tmp_path, encoded, damage):
    good = run(tmp_path)
    (file,) = files(tmp_path)
    damage(file)
    assert run(tmp_path) == good
    assert len(encoded) == 4
    assert run(tmp_path) == good
    assert len(encoded) == 4
    assert files(tmp_path) == [file]


def test_cache_that_can_not_be_written_does_no_harm(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert run(blocked) == run(None)
