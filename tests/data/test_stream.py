"""Rows that become a table part by part, beside the same rows encoded in memory."""

import json
import threading

import pytest

from peftctl.data import stream, table, workers
from peftctl.data.dataset import encode_all, fingerprint, training_rows
from peftctl.data.examples import load_examples
from peftctl.data.problems import Problems
from peftctl.data.sources import Row, rows_one_by_one
from peftctl.data.table import RowTable, sizes_of
from peftctl.errors import DataError
from peftctl.recipe.schema import DataSection
from tests.tiny import tiny_tokenizer

WORDS = ["the", "cat", "sat", "on", "mat", "and", "dog", "ran", "home", "to", "eat"]


def write(file, count, first=0, broken=()):
    lines = []
    for i in range(first, first + count):
        answer = "" if i in broken else " ".join(WORDS[: 1 + i % len(WORDS)])
        lines.append(json.dumps({"prompt": f"{WORDS[i % 7]} {WORDS[i % 5]}", "completion": answer}))
    file.write_text("\n".join(lines) + "\n")
    return str(file)


@pytest.fixture(autouse=True)
def in_small_parts(monkeypatch):
    monkeypatch.setattr(table, "LEAST_BYTES", 0)
    monkeypatch.setattr(workers, "PART", 7)
    monkeypatch.setattr(stream, "ROWS", 5)


def section(**keys):
    return DataSection(**{"format": "prompt_completion", "template": "{prompt}:", "max_dropped": 0.5, **keys})


def one_file(tmp_path):
    return section(train=write(tmp_path / "a.jsonl", 61, broken=(3, 8)), max_length=9)


def weighted(tmp_path, **keys):
    files = [write(tmp_path / f"{i}.jsonl", n, 10 * i, broken=range(11, 40, 5)) for i, n in enumerate((23, 31, 9, 4))]
    weights = (2.5, 0.4, 1.0, 0.1)
    return section(sources=[{"path": f, "weight": w} for f, w in zip(files, weights, strict=True)], **keys)


def held_out(tmp_path):
    return weighted(tmp_path, eval_fraction=0.2)


def rows_of(data, cache, count=1):
    return training_rows(load_examples(data, 3), tiny_tokenizer(), data, cache, "causal_lm", 3, count)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("recipe", [one_file, weighted, held_out])
def test_rows_report_and_fingerprint_are_those_of_rows_in_memory(recipe, count, tmp_path):
    data = recipe(tmp_path)
    plain, report = encode_all(load_examples(data, 3).train, tiny_tokenizer(), data)
    rows, found, mark = rows_of(data, tmp_path / "cache", count)
    assert isinstance(rows, RowTable)
    assert len(rows.table["ids"].chunks) > 5
    assert list(rows) == plain
    assert found == report
    assert mark == fingerprint(plain)
    assert sizes_of(rows) == sizes_of(plain)
    assert len(list((tmp_path / "cache" / "rows").iterdir())) == 1
    assert report.kept < report.rows


def test_an_epoch_has_each_row_of_a_source_as_often_as_its_weight_says(tmp_path):
    rows, _, _ = rows_of(weighted(tmp_path), tmp_path / "cache")
    places = [row.where for row in rows if row.source == 0]
    assert {places.count(where) for where in places} == {2, 3}
    assert [sum(row.source == i for row in rows) for i in (1, 2, 3)] == [11, 7, 1]  # less those without an answer


def test_what_is_wrong_is_told_as_for_rows_in_memory_and_nothing_is_left(tmp_path):
    data = one_file(tmp_path)
    file = tmp_path / "a.jsonl"
    lines = file.read_text().splitlines()
    for i in range(20, 60, 3):
        lines[i] = lines[i][:-5] if i % 2 else '{"prompt": "a"}'
    file.write_text("\n".join(lines))
    with pytest.raises(DataError) as told:
        rows_of(data, tmp_path / "cache")
    said = str(told.value).splitlines()
    assert sorted(int(line.split(":")[1]) for line in said[:10]) == list(range(21, 51, 3))
    assert "broken JSON" in said[1]
    assert "field 'completion' is missing" in said[0]
    assert said[10:] == ["data: and 4 more problems like these"]
    assert not list((tmp_path / "cache" / "rows").iterdir())


def test_a_format_that_does_not_fit_is_told_once(tmp_path):
    data = section(train=write(tmp_path / "a.jsonl", 61), columns={"prmopt": "a"}, template="alpaca")
    with pytest.raises(DataError) as told:
        rows_of(data, tmp_path / "cache")
    assert len(str(told.value).splitlines()) == 1


def test_reading_waits_for_the_processes():
    taken, most = [], 0
    for done, result in enumerate(workers.mapped(lambda part: part * part, numbers(40, taken), 2), 1):
        assert result == (done - 1) ** 2
        most = max(most, len(taken) - done)
    assert len(taken) == 40
    assert most <= 2 * 2


def numbers(count, taken):
    for i in range(count):
        taken.append(i)
        yield i


def test_processes_end_with_whoever_asked_for_them():
    before = threading.active_count()
    results = workers.mapped(lambda part: part, range(100), 2)
    assert next(results) == 0
    results.close()
    assert threading.active_count() == before


def test_lines_are_read_when_they_are_asked_for(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n{"a": 2}\nbroken\n')
    problems = Problems()
    rows = rows_one_by_one(str(file), problems)
    assert next(rows) == Row({"a": 1}, f"{file}:1")
    assert problems.count == 0
    assert [row.fields for row in rows] == [{"a": 2}]
    assert problems.count == 1


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_rows_of_columns_keep_their_numbers_from_batch_to_batch(kind, tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = pyarrow.table({"a": list(range(10))})
    file = tmp_path / f"x.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(rows, file, row_group_size=3)
    else:
        with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_file(sink, rows.schema) as writer:
            writer.write_table(rows, max_chunksize=3)
    found = list(rows_one_by_one(str(file), Problems()))
    assert found == [Row({"a": i}, f"{file}:{i + 1}") for i in range(10)]
