"""Files of every kind, and what is said about broken ones."""

from __future__ import annotations

import json

import pytest

from peftctl.data.sources import Row, read_rows
from peftctl.errors import DataError


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a file into the working directory, so that messages show its name alone."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, content: str | bytes) -> str:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(file)

    return write


def said(paths: str | list[str]) -> str:
    with pytest.raises(DataError) as error:
        read_rows(paths)
    return str(error.value)


class TestJsonLines:
    def test_blank_lines_bom_and_line_separators_inside_text(self, write):
        file = write("x.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\n  \n' + '{"a": "b\u2028c\x85d"}'.encode())
        assert read_rows(file) == [Row({"a": 1}, "x.jsonl:1"), Row({"a": "b\u2028c\x85d"}, "x.jsonl:4")]

    def test_every_broken_line_is_named(self, write):
        file = write("x.jsonl", '{"a": 1}\n{"a" 1}\n[1]\n{"a": "\\ud83d"}\n{"a": "\\ud83d\\ude00"}\n{"a": 1} {"b"\n')
        assert said(file).splitlines() == [
            "x.jsonl:2:6: broken JSON: Expecting ':' delimiter",
            "x.jsonl:3: expected an object with named fields, got a list",
            "x.jsonl:4: half a character (a lone \\ud800-\\udfff escape); write the whole character",
            "x.jsonl:6:10: broken JSON: Extra data",
        ]

    def test_other_encodings(self, write):
        assert said(write("x.jsonl", '{"a": 1}\n{"a": "é"}\n'.encode("latin-1"))) == (
            "x.jsonl:2: expected UTF-8, got byte 0xE9 at byte 8 of the line; save the file as UTF-8"
        )
        assert said(write("y.jsonl", '{"a": 1}'.encode("utf-16"))) == (
            "y.jsonl:1: expected UTF-8, got UTF-16; save the file as UTF-8"
        )

    def test_ten_problems_then_a_count(self, write):
        lines = said(write("x.jsonl", "{\n" * 30)).splitlines()
        assert [line.split(":")[1] for line in lines[:10]] == [str(i) for i in range(1, 11)]
        assert lines[10:] == ["data: and 20 more problems like these"]

    @pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.txt"])
    @pytest.mark.parametrize("content", ["", " \n\n"])
    def test_empty(self, write, name, content):
        assert said(write(name, content)) == f"{name}: expected rows, but the file is empty"

    def test_long_rows(self, write):
        text = "x" * 100_000
        assert read_rows(write("x.jsonl", json.dumps({"a": text})))[0].fields == {"a": text}


class TestJson:
    def test_list_rows_carry_their_lines(self, write):
        file = write("x.json", '[\n  {"a": 1},\n\n  {\n    "a": 2},\n {"a": 3}\n]\n')
        assert read_rows(file) == [Row({"a": 1}, "x.json:2"), Row({"a": 2}, "x.json:4"), Row({"a": 3}, "x.json:6")]

    def test_list_under_data(self, write):
        file = write("x.json", '{"version": 1, "data": [{"a": 1}, {"a": 2}]}')
        assert read_rows(file) == [Row({"a": 1}, "x.json:data[0]"), Row({"a": 2}, "x.json:data[1]")]

    def test_json_lines_by_another_name(self, write):
        assert read_rows(write("x.json", '{"a": 1}\n{"a": 2}\n'))[1] == Row({"a": 2}, "x.json:2")
        assert read_rows(write("y.json", '{"a": 1}\n')) == [Row({"a": 1}, "y.json:1")]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('[{"a": 1},\n{"a": }]', "x.json:2:7: broken JSON: Expecting value"),
            ('[{"a": 1}\n{"a": 2}]', "x.json:2:1: broken JSON: Expecting ',' or ']'"),
            ('[{"a": 1},\n', "x.json:2:1: broken JSON: Expecting value"),
            ('[{"a": 1}]\n x', "x.json:2:2: broken JSON: Extra data after the list"),
            ('[{"a": 1},\n 5]', "x.json:2: expected an object with named fields, got a number"),
            ('{\n"a": 1\n}', 'x.json: expected a list of rows or {"data": [...]}, got an object'),
            ("5", 'x.json: expected a list of rows or {"data": [...]}, got a number'),
            ('{"a": 1', "x.json:1:8: broken JSON: Expecting ',' delimiter"),
            ("[]", "x.json: expected rows, but the file is empty"),
        ],
    )
    def test_broken(self, write, content, message):
        assert said(write("x.json", content)) == message


class TestCsv:
    def test_records_over_several_lines(self, write):
        file = write("x.csv", 'a,b\n1,"x\r\ny, ""z"""\n\n2,w\n')
        assert read_rows(file) == [
            Row({"a": "1", "b": 'x\r\ny, "z"'}, "x.csv:2"),
            Row({"a": "2", "b": "w"}, "x.csv:5"),
        ]

    def test_tabs(self, write):
        assert read_rows(write("x.tsv", "a\tb\n1\t2\n")) == [Row({"a": "1", "b": "2"}, "x.tsv:2")]

    def test_long_fields(self, write):
        assert len(read_rows(write("x.csv", "a\n" + "x" * 200_000))[0].fields["a"]) == 200_000

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("a,b\n1,2\n1,2,3\n", "x.csv:3: expected 2 fields as in the header, got 3; quote fields"),
            ('a,b\n1,2\n1,"2\n3,4\n', "x.csv:3: broken CSV: unexpected end of data; a quotation mark may be left open"),
            ("a,b,a\n1,2,3\n", "x.csv:1: column 'a' is named twice in the header"),
            ("a,b\n", "x.csv: expected rows, but the file is empty"),
        ],
    )
    def test_broken(self, write, content, message):
        assert said(write("x.csv", content)).startswith(message)

    def test_other_encoding(self, write):
        assert said(write("x.csv", "a\nx\né\n".encode("latin-1"))).startswith("x.csv:3: expected UTF-8, got byte 0xE9")


def test_txt_gives_a_row_a_line(write):
    assert read_rows(write("x.txt", "one\n\n two \n")) == [
        Row({"text": "one"}, "x.txt:1"),
        Row({"text": " two "}, "x.txt:3"),
    ]


class TestColumnar:
    rows = ({"a": "x", "m": [{"role": "user"}]}, {"a": None, "m": []})

    def test_parquet(self, write, tmp_path):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(self.rows)), tmp_path / "x.parquet")
        assert read_rows(str(tmp_path / "x.parquet")) == [
            Row(row, f"x.parquet:{i}") for i, row in enumerate(self.rows, 1)
        ]

    @pytest.mark.parametrize("layout", ["new_file", "new_stream"])
    def test_arrow(self, write, tmp_path, layout):
        import pyarrow

        table = pyarrow.Table.from_pylist(list(self.rows))
        sink = pyarrow.OSFile(str(tmp_path / "x.arrow"), "wb")
        with sink, getattr(pyarrow.ipc, layout)(sink, table.schema) as writer:
            writer.write_table(table)
        assert read_rows(str(tmp_path / "x.arrow")) == [Row(row, f"x.arrow:{i}") for i, row in enumerate(self.rows, 1)]

    @pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
    @pytest.mark.parametrize("content", [b"", b"not it", b"ARROW1 but not really", b"PAR1"])
    def test_broken(self, write, name, content):
        assert said(write(name, content)).startswith(f"{name}: not a readable {name[2:]} file: ")

    def test_text_that_is_not_utf8(self, write, tmp_path):
        import pyarrow
        import pyarrow.parquet

        column = pyarrow.array([b"\xe9"], pyarrow.binary()).view(pyarrow.string())
        pyarrow.parquet.write_table(pyarrow.table({"a": column}), tmp_path / "x.parquet")
        assert said(str(tmp_path / "x.parquet")) == "x.parquet: expected UTF-8 text in its columns, got byte 0xE9"


class TestPaths:
    def test_several_files_globs_and_folders(self, write, tmp_path):
        for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", ".hidden/d.jsonl"):
            write(f"d/{name}", json.dumps({"a": name}))
        write("d/README.md", "no data")
        names = [row.fields["a"] for row in read_rows(str(tmp_path / "d"))]
        assert names == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
        assert [row.where for row in read_rows(str(tmp_path / "d" / "*.jsonl"))] == ["d/a.jsonl:1", "d/b.jsonl:1"]
        several = read_rows([str(tmp_path / "d/b.jsonl"), str(tmp_path / "d/a.jsonl")])
        assert [row.fields["a"] for row in several] == ["b.jsonl", "a.jsonl"]

    def test_names_may_hold_brackets(self, write):
        assert len(read_rows(write("x[1].jsonl", '{"a": 1}'))) == 1

    def test_missing(self, write, tmp_path):
        write("train.jsonl", "{}")
        assert said(str(tmp_path / "trian.jsonl")) == "trian.jsonl: no such file; did you mean 'train.jsonl'?"
        assert said(str(tmp_path / "*.csv")) == "*.csv: no file matches this pattern"
        assert said(str(tmp_path / "none" / "x.jsonl")) == "none/x.jsonl: no such file"
        (tmp_path / "empty").mkdir()
        assert said(str(tmp_path / "empty")).startswith("empty: the folder holds no data file; known: .jsonl")
        assert said([]) == "data: expected at least one file, got an empty list"

    def test_unknown_kind(self, write):
        assert said(write("x.xlsx", "a")).startswith("x.xlsx: unknown kind of file '.xlsx'; known: .jsonl")

    def test_problems_of_all_files_come_together(self, write):
        files = [write("x.jsonl", "{"), write("y.jsonl", ""), write("z.csv", "a\n1,2\n")]
        assert [line.split(":")[0] for line in said(files).splitlines()] == ["x.jsonl", "y.jsonl", "z.csv"]


class TestHub:
    def test_rows_of_a_split(self, monkeypatch):
        import datasets

        asked = []

        def load_dataset(name, config, split):
            asked.append((name, config, split))
            return [{"a": 1}, {"a": 2}]

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert read_rows("owner/name") == [Row({"a": 1}, "owner/name:1"), Row({"a": 2}, "owner/name:2")]
        read_rows(["owner/name:test", "owner/name:main:test"])
        assert asked == [("owner/name", None, "train"), ("owner/name", None, "test"), ("owner/name", "main", "test")]

    def test_offline_is_one_line(self, monkeypatch):
        import datasets

        def load_dataset(name, config, split):
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist\nmore")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert said("owner/name") == (
            "owner/name: no such file here, and the hub does not give it: Dataset 'owner/name' doesn't exist"
        )
