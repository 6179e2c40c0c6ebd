"""Weighted sources: which rows an epoch sees, what is held out, and what is told of each source."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

import pytest

from peftctl.data import cache as caching
from peftctl.data.dataset import encode_all, fingerprint
from peftctl.data.examples import load_examples
from peftctl.data.prompts import generation_prompts
from peftctl.errors import DataError
from tests.data import styles
from tests.data.rows import section
from tests.data.styles import byte_level
from tests.data.test_dataset import write


@pytest.fixture
def files(tmp_path):
    """20 and 8 rows that are all different, of two formats."""
    pairs = [{"prompt": f"Hi {i}", "completion": "Hello"} for i in range(20)]
    asked = [{"q": f"How are you {i}", "a": "Fine thanks"} for i in range(8)]
    return write(tmp_path / "pairs.jsonl", pairs), write(tmp_path / "asked.jsonl", asked)


def mixed(files, *weights, **keys):
    pairs, asked = files
    columns = {"instruction": "q", "output": "a"}
    sources = [
        {"path": pairs, "weight": weights[0]},
        {"path": asked, "weight": weights[1], "format": "alpaca", "columns": columns},
    ]
    return section(train=None, sources=sources, format="prompt_completion", **keys)


def places(examples):
    return [example.where.rpartition("/")[2] for example in examples]


def counted(files, *weights, seed=0, **keys):
    """Return how often an epoch sees each row of each source."""
    counts = Counter(places(load_examples(mixed(files, *weights, **keys), seed).train))
    return [
        [counts[f"pairs.jsonl:{i + 1}"] for i in range(20)],
        [counts[f"asked.jsonl:{i + 1}"] for i in range(8)],
    ]


def test_weight_one_sees_every_row_once_in_order(files):
    train = load_examples(mixed(files, 1.0, 1.0), 0).train
    assert places(train) == [f"pairs.jsonl:{i}" for i in range(1, 21)] + [f"asked.jsonl:{i}" for i in range(1, 9)]
    assert [example.source for example in train] == [0] * 20 + [1] * 8


def test_whole_weights_repeat_and_fractions_draw(files):
    first, second = counted(files, 0.25, 2.5)
    assert sorted(first) == [0] * 15 + [1] * 5
    assert sorted(second) == [2] * 4 + [3] * 4


def test_the_draw_follows_the_seed_and_differs_between_sources(files):
    assert counted(files, 0.25, 0.5) == counted(files, 0.25, 0.5)
    assert counted(files, 0.25, 0.5)[0] != counted(files, 0.25, 0.5, seed=1)[0]
    twice = section(train=None, sources=[{"path": files[0], "weight": 0.5}] * 2, format="prompt_completion")
    drawn = places(load_examples(twice, 0).train)
    assert len(drawn) == 20 and drawn[:10] != drawn[10:]


def test_a_small_weight_still_gives_a_row(files):
    assert [sum(counts) for counts in counted(files, 0.001, 0.001)] == [1, 1]


def test_no_copy_of_a_held_out_row_is_trained_on(files):
    examples = load_examples(mixed(files, 3.0, 2.0, eval_fraction=0.25), 0)
    held_out = set(places(examples.eval))
    assert len(held_out) == len(examples.eval) == 7
    assert held_out.isdisjoint(places(examples.train))
    assert {*held_out, *places(examples.train)} == set(places(load_examples(mixed(files, 1.0, 1.0), 0).train))
    assert held_out == set(places(load_examples(mixed(files, 1.0, 0.5, eval_fraction=0.25), 0).eval))


def test_formats_and_columns_are_each_sources_own(files):
    tokenizer = byte_level(styles.CHATML)
    data = mixed(files, 1.0, 1.0)
    rows, _ = encode_all(load_examples(data, 0).train, tokenizer, data)
    alone = section(train=files[1], format="alpaca", columns={"instruction": "q", "output": "a"})
    expected, _ = encode_all(load_examples(alone, 0).train, tokenizer, alone)
    assert [row.input_ids for row in rows[20:]] == [row.input_ids for row in expected]


def test_left_out_format_and_columns_are_those_of_the_section(tmp_path, files):
    data = section(
        train=None, sources=[{"path": files[1]}], format="alpaca", columns={"instruction": "q", "output": "a"}
    )
    assert load_examples(data, 0).train[0].messages[0].content == "How are you 0"


def test_a_source_of_texts_needs_no_chat_template(tmp_path):
    tokenizer = byte_level.__wrapped__(styles.CHATML)
    tokenizer.chat_template = None
    path = write(tmp_path / "texts.jsonl", [{"text": "Hi there"}])
    data = section(train=None, sources=[{"path": path, "format": "text"}])
    examples = load_examples(data, 0).train
    assert generation_prompts(examples, tokenizer, data) == []
    rows, _ = encode_all(examples, tokenizer, data)
    assert len(rows) == 1


def test_report_by_source(files):
    tokenizer = byte_level(styles.CHATML)
    data = mixed(files, 2.0, 0.5)
    rows, report = encode_all(load_examples(data, 0).train, tokenizer, data)
    first, second = report.sources
    assert (first.rows, second.rows) == (40, 4) and report.rows == 44
    assert first.tokens == sum(len(row.input_ids) for row in rows[:40])
    assert first.tokens + second.tokens == report.tokens
    assert first.share + second.share == pytest.approx(1.0)
    assert second.supervised_tokens == sum(label != -100 for row in rows[40:] for label in row.labels)
    assert second.supervised_share == second.supervised_tokens / second.tokens
    names = [name for name, _ in report.lines()]
    assert "source 1: pairs.jsonl, weight 2" in names and "source 2: asked.jsonl, weight 0.5" in names
    assert asdict(report)["sources"][1]["weight"] == 0.5
    assert list(report.warnings()) == []


def test_rows_without_sources_have_no_report_by_source(files):
    data = section(train=files[0], format="prompt_completion")
    _, report = encode_all(load_examples(data, 0).train, byte_level(styles.CHATML), data)
    assert report.sources == ()


def test_a_source_of_which_nothing_is_left_is_told(files, tmp_path):
    path = write(tmp_path / "empty.jsonl", [{"prompt": "Hi", "completion": ""}])
    data = section(
        train=None, sources=[{"path": files[0]}, {"path": path}], format="prompt_completion", max_dropped=1.0
    )
    _, report = encode_all(load_examples(data, 0).train, byte_level(styles.CHATML), data)
    assert "data.sources[1]: none of its rows is trained on; give it more rows or a higher weight" in report.warnings()


def test_fingerprint_follows_the_weights(files):
    tokenizer = byte_level(styles.CHATML)

    def of(*weights, seed=0):
        data = mixed(files, *weights)
        return fingerprint(encode_all(load_examples(data, seed).train, tokenizer, data)[0])

    assert of(1.0, 1.0) == of(1.0, 1.0, seed=1)  # nothing is drawn
    assert len({of(1.0, 1.0), of(2.0, 1.0), of(1.0, 0.5), of(1.0, 0.5, seed=1)}) == 4


def test_the_cache_holds_each_row_once_and_sources_apart(files, tmp_path, monkeypatch):
    tokenizer = byte_level(styles.CHATML)
    saved = []
    save = caching.save_rows
    monkeypatch.setattr(caching, "save_rows", lambda file, groups: saved.append(len(groups)) or save(file, groups))

    def rows(*weights):
        data = mixed(files, *weights)
        return encode_all(load_examples(data, 0).train, tokenizer, data, cache=tmp_path / "cache")[0]

    fresh = rows(3.0, 1.0)
    assert saved == [20, 8]
    assert rows(3.0, 1.0) == fresh and len(fresh) == 68
    rows(1.0, 2.0)
    assert saved == [20, 8]  # other weights read what is there


def test_all_sources_with_problems_are_named(tmp_path, files):
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "Hi"}])
    sources = [{"path": bad}, {"path": files[1]}, {"path": files[1], "columns": {"prompt": "question"}}]
    with pytest.raises(DataError) as error:
        list(load_examples(section(train=None, sources=sources, format="prompt_completion"), 0).train)
    text = str(error.value)
    assert "bad.jsonl:1: field 'completion' is missing" in text
    assert "map it with data.sources[1].columns {prompt: ...}" in text
    assert "field 'question' is missing (data.sources[2].columns maps prompt to it)" in text
