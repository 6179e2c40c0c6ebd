"""From files to encoded rows: splits, gates, fingerprints and the report."""

from __future__ import annotations

import json

import pytest

from peftctl.data.dataset import encode_all, fingerprint, overlap
from peftctl.data.encode import EncodedRow
from peftctl.data.examples import load_examples
from peftctl.errors import DataError
from tests.data import styles
from tests.data.rows import ONE_TURN, TWO_TURNS, assistant, example, section, system, user
from tests.data.styles import byte_level, metaspace


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def numbered(tmp_path):
    """20 rows that are all different."""
    return write(tmp_path / "x.jsonl", [{"prompt": f"Hi {i}", "completion": "Hello"} for i in range(20)])


class TestSplit:
    def split(self, path, seed=0, **keys):
        examples = load_examples(section(train=path, format="prompt_completion", **keys), seed)
        return [[example.where for example in part] for part in (examples.train, examples.eval)]

    def test_fraction_is_seeded_disjoint_and_ordered(self, numbered):
        train, held_out = self.split(numbered, eval_fraction=0.25)
        assert (len(train), len(held_out)) == (15, 5)
        assert sorted(train + held_out) == sorted(self.split(numbered)[0])
        assert train == [place for place in self.split(numbered)[0] if place not in held_out]
        assert self.split(numbered, eval_fraction=0.25) == [train, held_out]
        assert self.split(numbered, seed=1, eval_fraction=0.25)[1] != held_out

    def test_both_parts_get_a_row(self, numbered):
        assert len(self.split(numbered, eval_fraction=0.001)[1]) == 1
        assert len(self.split(numbered, eval_fraction=0.999)[0]) == 1

    def test_one_row_can_not_be_split(self, tmp_path):
        path = write(tmp_path / "x.jsonl", [{"prompt": "a", "completion": "b"}])
        with pytest.raises(DataError, match="expected at least 2 rows to hold one out, got 1"):
            self.split(path, eval_fraction=0.5)

    def test_own_eval_file_wins(self, numbered, tmp_path):
        held_out = write(tmp_path / "y.jsonl", [{"prompt": "a", "completion": "b"}])
        assert [len(part) for part in self.split(numbered, eval=held_out, eval_fraction=0.5)] == [20, 1]


def many(*conversations, data=None, tokenizer=None):
    data = data or section(max_dropped=1.0)
    examples = [example(data, messages=messages) for messages in conversations]
    return encode_all(examples, tokenizer or byte_level(styles.CHATML), data)


class TestReport:
    def test_figures(self):
        rows, report = many(ONE_TURN, TWO_TURNS, [user("Hi")], [user("Hi"), assistant(" ")])
        assert [len(row.input_ids) for row in rows] == [13, 28]
        assert (report.rows, report.kept, report.tokens, report.supervised_tokens) == (4, 2, 41, 7)
        assert report.share == 7 / 41
        assert {reason: dropped.count for reason, dropped in report.dropped.items()} == {
            "no assistant turn": 1,
            "empty answer": 1,
        }
        assert report.dropped["empty answer"].places == ("rows.jsonl:1",)
        assert (report.longest, report.median, report.p95) == (28, 28, 28)
        assert (report.eos_supervised, report.truncated_answers, report.doubled_bos) == (1.0, 0, 0)
        assert (report.split_conversations, report.pad_is_eos) == (0, False)

    def test_first_token_is_not_counted_as_predicted(self):
        data = section(format="text")
        _, report = encode_all([example(data, text="Hi there")], byte_level(styles.CHATML), data)
        assert (report.tokens, report.supervised_tokens) == (3, 2)  # Hi _there <|im_end|>

    def test_lines_and_warnings(self):
        data = section(max_length=11, max_dropped=1.0)
        _, report = many(ONE_TURN, [user("Hi there you " * 9), assistant("Hello")], data=data)
        assert ["rows", "1 of 2"] in report.lines()
        assert ["dropped: prompt longer than max_length", "1 row (rows.jsonl:1)"] in report.lines()
        assert list(report.warnings()) == [
            "data: dropped (prompt longer than max_length): 1 row (rows.jsonl:1)",
            "data: 1 rows have answers cut by data.max_length: raise it or shorten them",
        ]

    def test_good_data_warn_of_nothing(self):
        assert list(many(ONE_TURN)[1].warnings()) == []

    def test_doubled_bos_is_seen(self):
        _, report = many(ONE_TURN, tokenizer=byte_level("{{ bos_token + bos_token }}" + styles.CHATML))
        assert report.doubled_bos == 1
        assert any("two BOS tokens" in line for line in report.warnings())

    def test_split_conversations(self):
        _, report = many(TWO_TURNS, ONE_TURN, tokenizer=byte_level(styles.QWEN3))
        assert (report.rows, report.split_conversations) == (3, 1)
        assert ["conversations split", "1 (earlier turns read differently in later prompts)"] in report.lines()

    def test_rows_that_do_not_learn_to_stop(self):
        tokenizer = metaspace.__wrapped__(styles.NO_TOKENS)
        tokenizer.eos_token = None
        data = section(format="text")
        _, report = encode_all([example(data, text="Hi there")], tokenizer, data)
        assert report.eos_supervised == 0.0
        assert list(report.warnings()) == ["data: 1 rows do not train an end token: the model may not learn to stop"]

    def test_pad_is_eos(self):
        tokenizer = byte_level.__wrapped__(styles.HARMONY)
        tokenizer.pad_token = tokenizer.eos_token
        _, report = many(ONE_TURN, tokenizer=tokenizer)
        assert report.pad_is_eos and report.eos_supervised == 1.0
        assert ["padding", "is the EOS token; EOS is trained on all the same"] in report.lines()


class TestGate:
    def test_too_many_dropped(self):
        long = [user("Hi there you " * 9), assistant("Hello")]
        with pytest.raises(DataError) as error:
            many(ONE_TURN, long, long, data=section(max_length=13))
        assert str(error.value) == (
            "data: 2 of 3 rows have nothing to train on, more than data.max_dropped 0.05 "
            "(prompt longer than max_length: 2 rows (rows.jsonl:1, rows.jsonl:1)); "
            "fix these rows, raise data.max_length (now 13) or data.max_dropped"
        )

    def test_nothing_left(self):
        with pytest.raises(DataError, match="1 of 1 rows have nothing to train on, no row is left to train on"):
            many([user("Hi")])

    def test_share_at_the_limit_passes(self):
        rows, report = many(ONE_TURN, ONE_TURN, ONE_TURN, [user("Hi")], data=section(max_dropped=0.25))
        assert (len(rows), report.kept) == (3, 3)

    def test_all_rows_that_a_template_refuses_are_named(self):
        bad = [system("help"), *ONE_TURN]
        with pytest.raises(DataError) as error:
            many(*[bad] * 12, tokenizer=metaspace(styles.GEMMA))
        assert len(error.value.problems) == 11
        assert str(error.value.problems[0]) == (
            "rows.jsonl:1: the tokenizer's chat template refuses this conversation: System role not supported"
        )

    def test_tokenizer_without_template_is_one_error(self):
        with pytest.raises(DataError) as error:
            many(ONE_TURN, ONE_TURN, tokenizer=byte_level(""))
        assert len(error.value.problems) == 1


def row(ids, labels):
    return EncodedRow(ids, labels, "x:1")


def test_fingerprint_follows_tokens_and_labels_and_order():
    base = [row([1, 2], [-100, 2]), row([3], [3])]
    others = [
        [row([1, 4], [-100, 4]), row([3], [3])],
        [row([1, 2], [1, 2]), row([3], [3])],
        [row([3], [3]), row([1, 2], [-100, 2])],
        [row([1, 2, 3], [-100, 2, 3])],
    ]
    assert len({fingerprint(rows) for rows in [base, *others]}) == 5
    assert fingerprint(base) == fingerprint([EncodedRow(r.input_ids, r.labels, "elsewhere:9") for r in base])


def test_overlap_counts_held_out_rows():
    train = [row([1, 2], [-100, 2]), row([3], [3])]
    held_out = [row([1, 2], [-100, 2]), row([1, 2], [1, 2]), row([1, 2], [-100, 2]), row([4], [4])]
    assert overlap(train, held_out) == 2
