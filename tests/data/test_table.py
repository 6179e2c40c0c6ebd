"""Training rows in a table on disk, and examples that several processes encode."""

import json
import os
import signal
import time

import pytest

from peftctl.commands.prepare import refuse_leak
from peftctl.data import examples, stream, table, workers
from peftctl.data.dataset import encode_all, fingerprint, overlap, training_rows
from peftctl.data.examples import load_examples
from peftctl.data.table import RowTable, sizes_of, table_file
from peftctl.errors import DataError, UsageError
from peftctl.recipe.schema import DataSection
from tests.tiny import tiny_tokenizer

WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "ran", "home", "to", "eat"]


def write(file, count, broken=()):
    lines = []
    for i in range(count):
        answer = " ".join(WORDS[: 1 + i % len(WORDS)])
        lines.append(json.dumps({"prompt": f"{i} {WORDS[i % 7]}", "completion": "" if i in broken else answer}))
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(table, "LEAST_BYTES", 0)


def section(tmp_path, **keys):
    file = tmp_path / "train.jsonl"
    if not file.exists():
        write(file, 60, broken=(3, 8))
    chosen = {"train": str(file), "format": "prompt_completion", "template": "{prompt}:", "max_length": 12}
    return DataSection(**{**chosen, "max_dropped": 0.5, **keys})


def rows_of(data, cache, task="causal_lm", seed=0):
    return training_rows(load_examples(data, seed), tiny_tokenizer(), data, cache, task, seed)


def refuse_reading(monkeypatch):
    def refuse(*_):
        raise AssertionError("the file was read")

    monkeypatch.setattr(examples, "read_rows", refuse)
    monkeypatch.setattr(stream, "rows_one_by_one", refuse)


@pytest.mark.parametrize("task", ["causal_lm", "seq2seq_lm"])
@pytest.mark.usefixtures("small")
def test_rows_come_back_without_reading_the_files(task, tmp_path, monkeypatch):
    data = section(tmp_path)
    plain, report = encode_all(load_examples(data, 0).train, tiny_tokenizer(), data, task=task)
    first, first_report, mark = rows_of(data, tmp_path / "cache", task)
    refuse_reading(monkeypatch)
    again, again_report, again_mark = rows_of(data, tmp_path / "cache", task)
    assert isinstance(first, RowTable)
    assert list(first) == list(again) == plain
    assert first_report == again_report == report
    assert mark == again_mark == fingerprint(plain)
    assert any(row.truncated for row in again)
    assert sizes_of(again) == sizes_of(plain)
    assert report.kept < report.rows


@pytest.mark.usefixtures("small")
def test_it_is_a_sequence(tmp_path):
    data = section(tmp_path)
    plain, _ = encode_all(load_examples(data, 0).train, tiny_tokenizer(), data)
    rows, _, _ = rows_of(data, tmp_path / "cache")
    assert rows[-1] == plain[-1]
    assert rows[3:9:2] == plain[3:9:2]
    assert rows[:0] == []
    for i in (len(plain), -len(plain) - 1):
        with pytest.raises(IndexError):
            rows[i]


@pytest.mark.usefixtures("small")
def test_sources_and_weights(tmp_path):
    write(tmp_path / "a.jsonl", 10)
    write(tmp_path / "b.jsonl", 7)
    sources = [{"path": str(tmp_path / "a.jsonl"), "weight": 1.5}, {"path": str(tmp_path / "b.jsonl")}]
    data = section(tmp_path, train=None, sources=sources)
    plain, report = encode_all(load_examples(data, 4).train, tiny_tokenizer(), data)
    rows, found, _ = rows_of(data, tmp_path / "cache", seed=4)
    assert list(rows) == plain
    assert {row.source for row in rows} == {0, 1}
    assert found == report


@pytest.mark.usefixtures("small")
def test_whatever_rows_follow_from_makes_another_table(tmp_path):
    data = section(tmp_path)
    tokenizer = tiny_tokenizer()
    found = {table_file(tmp_path, data, tokenizer, "causal_lm", 0)}
    found.add(table_file(tmp_path, data, tokenizer, "seq2seq_lm", 0))
    found.add(table_file(tmp_path, data, tokenizer, "causal_lm", 1))
    found.add(table_file(tmp_path, data.model_copy(update={"max_length": 11}), tokenizer, "causal_lm", 0))
    tokenizer.add_tokens(["<new>"])
    found.add(table_file(tmp_path, data, tokenizer, "causal_lm", 0))
    file = tmp_path / "train.jsonl"
    text = file.read_text()
    file.write_text(text.replace("mat", "hat"))
    found.add(table_file(tmp_path, data, tiny_tokenizer(), "causal_lm", 0))
    assert len(found) == 6
    file.write_text(text)
    later = time.time() + 60
    os.utime(file, (later, later))  # touched, not changed
    assert table_file(tmp_path, data, tiny_tokenizer(), "causal_lm", 0) in found


def test_small_files_and_the_hub_have_none(tmp_path):
    assert table_file(tmp_path, section(tmp_path), tiny_tokenizer(), "causal_lm", 0) is None
    data = section(tmp_path, train="owner/name")
    assert table_file(tmp_path, data, tiny_tokenizer(), "causal_lm", 0) is None
    rows, _, _ = rows_of(section(tmp_path), tmp_path / "cache")
    assert isinstance(rows, list)
    assert not (tmp_path / "cache" / "rows").exists()


@pytest.mark.usefixtures("small")
def test_a_damaged_table_is_made_again(tmp_path):
    data = section(tmp_path)
    first, _, mark = rows_of(data, tmp_path / "cache")
    expected = list(first)
    (file,) = (tmp_path / "cache" / "rows").iterdir()
    for content in (b"", file.read_bytes()[:-200], b"no table"):
        file.unlink()  # the mapped one stays as it is
        file.write_bytes(content)
        rows, _, again = rows_of(data, tmp_path / "cache")
        assert (list(rows), again) == (expected, mark)


@pytest.mark.usefixtures("small")
def test_a_table_that_can_not_be_written_is_done_without(tmp_path):
    data = section(tmp_path)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "rows").write_text("in the way")
    rows, _, _ = rows_of(data, tmp_path / "cache")
    assert isinstance(rows, list)
    assert len(rows) == 58


@pytest.mark.usefixtures("small")
def test_too_many_dropped_rows_are_refused_again(tmp_path):
    data = section(tmp_path)
    rows_of(data, tmp_path / "cache")
    strict = section(tmp_path, max_dropped=0.0)
    for _ in range(2):
        with pytest.raises(DataError, match="2 of 60 rows have nothing to train on"):
            rows_of(strict, tmp_path / "cache")


@pytest.mark.usefixtures("small")
def test_wrong_answers_stay_with_their_rows(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps({"prompt": "a", "completion": "b", "wrong_answers": ["c"]}) + "\n")
    rows, _, _ = rows_of(section(tmp_path), tmp_path / "cache")
    assert rows[0].wrong


@pytest.mark.usefixtures("small")
def test_leaks_are_found(tmp_path):
    data = section(tmp_path)
    rows, _, _ = rows_of(data, tmp_path / "cache")
    plain = list(rows)
    assert overlap(rows, plain[:5]) == overlap(plain, plain[:5]) == 5
    with pytest.raises(UsageError, match="every held-out row is also a training row"):
        refuse_leak(rows, plain[:5])


def test_several_processes_encode_as_one_does(tmp_path, monkeypatch):
    data = section(tmp_path)
    examples = load_examples(data, 0).train
    alone, report = encode_all(examples, tiny_tokenizer(), data)
    monkeypatch.setattr(workers, "LEAST_EXAMPLES", 10)
    monkeypatch.setattr(workers, "PART", 7)
    before = dict(os.environ)
    together, together_report = encode_all(examples, tiny_tokenizer(), data, workers=2)
    assert (together, together_report) == (alone, report)
    assert dict(os.environ) == before


def test_their_problems_are_told_in_the_order_of_the_rows(tmp_path, monkeypatch):
    lines = [json.dumps({"text": "a", "label": "x" if i % 3 else "unknown"}) for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    data = DataSection(train=str(tmp_path / "rows.jsonl"), format="labelled_text", labels=["x", "y"], max_length=8)
    examples = load_examples(data, 0).train
    monkeypatch.setattr(workers, "LEAST_EXAMPLES", 10)
    monkeypatch.setattr(workers, "PART", 7)
    told = []
    for count in (1, 2):
        with pytest.raises(DataError) as error:
            encode_all(examples, tiny_tokenizer(), data, task="seq_cls", workers=count)
        told.append(str(error.value))
    assert told[0] == told[1]
    assert "10 more" in told[0]


def test_examples_are_read_late(tmp_path):
    data = section(tmp_path, train=str(tmp_path / "missing.jsonl"))
    examples = load_examples(data, 0)
    assert examples.eval == []
    with pytest.raises(DataError, match="no such file"):
        len(examples.train)


def test_a_file_that_can_not_be_hashed_is_left_to_its_reader(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "LEAST_BYTES", 0)
    data = section(tmp_path)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(table.hashlib, "file_digest", refuse)
    assert table_file(tmp_path, data, tiny_tokenizer(), "causal_lm", 0) is None


def test_without_one_of_the_processes_the_others_work_is_done_here(tmp_path, monkeypatch):
    data = section(tmp_path)
    examples = load_examples(data, 0).train
    alone, _ = encode_all(examples, tiny_tokenizer(), data)
    monkeypatch.setattr(workers, "LEAST_EXAMPLES", 10)
    monkeypatch.setattr(workers, "_call", die)
    together, _ = encode_all(examples, tiny_tokenizer(), data, workers=2)
    assert together == alone


def die(_):
    os.kill(os.getpid(), signal.SIGKILL)
