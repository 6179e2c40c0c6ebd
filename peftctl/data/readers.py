"""One reader a kind of file: (path, name to show, problems) -> (fields, place) of each row.

A row that can't be read goes to `problems` with its line, and reading goes on with the next one.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftctl.data.problems import Problems, kind

Rows = Iterator[tuple[dict[str, Any], str]]

_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPE = "\\u"
_LONGEST_FIELD = 2**31 - 1


def jsonl(path: Path, shown: str, problems: Problems) -> Rows:
    """Yield the object of every line that is not blank."""
    for number, line in _lines(path, shown, problems):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            problems.add(f"{shown}:{number}:{error.colno}", f"broken JSON: {error.msg}")
            continue
        yield from _checked(value, f"{shown}:{number}", problems, escapes=_ESCAPE in line)


def json_file(path: Path, shown: str, problems: Problems) -> Rows:
    """Yield the objects of a list, of {"data": [...]}, or of a file that is JSON lines by another name."""
    text = _text(path, shown, problems)
    start = _skip(text, 0)
    if start == len(text):
        return
    if text[start] == "[":
        yield from _list_items(text, start, shown, problems)
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:
            yield from jsonl(path, shown, problems)
        else:
            problems.add(f"{shown}:{error.lineno}:{error.colno}", f"broken JSON: {error.msg}")
        return
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        for i, item in enumerate(value["data"]):
            yield from _checked(item, f"{shown}:data[{i}]", problems, escapes=_ESCAPE in text)
    elif isinstance(value, dict) and "\n" not in text.strip():
        yield from _checked(value, f"{shown}:1", problems, escapes=_ESCAPE in text)
    else:
        problems.add(shown, f'expected a list of rows or {{"data": [...]}}, got {kind(value)}')


def csv_file(path: Path, shown: str, problems: Problems) -> Rows:
    """Yield the records below the header line; quoted fields may span lines."""
    text = _text(path, shown, problems)
    csv.field_size_limit(_LONGEST_FIELD)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    number = 1
    try:
        for record in reader:
            where, number = f"{shown}:{number}", reader.line_num + 1
            if not record:
                continue
            if header is None:
                header = record
                doubled = sorted({name for name in header if header.count(name) > 1})
                if doubled:
                    problems.add(where, f"column {doubled[0]!r} is named twice in the header")
            elif len(record) != len(header):
                problems.add(
                    where,
                    f"expected {len(header)} fields as in the header, got {len(record)}",
                    "quote fields that hold a comma or a line break",
                )
            else:
                yield dict(zip(header, record, strict=True)), where
    except csv.Error as error:
        problems.add(f"{shown}:{number}", f"broken CSV: {error}", "a quotation mark may be left open")


def txt(path: Path, shown: str, problems: Problems) -> Rows:
    """Yield every line that is not blank as field `text`."""
    for number, line in _lines(path, shown, problems):
        yield {"text": line}, f"{shown}:{number}"


def parquet(path: Path, shown: str, problems: Problems) -> Rows:
    """Yield the rows of a parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _batches_rows(file.iter_batches(), shown, problems)
    except pyarrow.ArrowException as error:
        problems.add(shown, f"not a readable parquet file: {_first_line(error)}")


def arrow(path: Path, shown: str, problems: Problems) -> Rows:
    """Yield the rows of an arrow file, in the stream layout that `datasets` writes or in the file layout."""
    import pyarrow

    try:
        with pyarrow.OSFile(str(path), "rb") as source:
            if source.read(6) == b"ARROW1":
                file = pyarrow.ipc.open_file(source)
                batches = (file.get_batch(i) for i in range(file.num_record_batches))
            else:
                source.seek(0)
                batches = iter(pyarrow.ipc.open_stream(source))
            yield from _batches_rows(batches, shown, problems)
    except pyarrow.ArrowException as error:
        problems.add(shown, f"not a readable arrow file: {_first_line(error)}")


def _batches_rows(batches: Iterator[Any], shown: str, problems: Problems) -> Rows:
    number = 0
    for batch in batches:
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError as error:
            problems.add(shown, f"expected UTF-8 text in its columns, got byte 0x{error.object[error.start]:02X}")
            return
        for fields in rows:
            number += 1
            yield fields, f"{shown}:{number}"


def _lines(path: Path, shown: str, problems: Problems) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, text) of each line that is UTF-8 and not blank, without reading the whole file at once.

    Lines end at a line feed alone: str.splitlines would also cut at characters that JSON allows inside text.
    """
    with path.open("rb") as file:
        for number, whole in enumerate(file, 1):
            raw = whole.removesuffix(b"\n")
            if number == 1:
                raw = raw.removeprefix(_BOM)
                if _is_utf16(raw, shown, problems):
                    return
            try:
                line = raw.removesuffix(b"\r").decode("utf-8")
            except UnicodeDecodeError as error:
                found = f"byte 0x{raw[error.start]:02X} at byte {error.start + 1} of the line"
                problems.add(f"{shown}:{number}", f"expected UTF-8, got {found}", "save the file as UTF-8")
                continue
            if line.strip():
                yield number, line


def _is_utf16(content: bytes, shown: str, problems: Problems) -> bool:
    if content[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        return False
    problems.add(f"{shown}:1", "expected UTF-8, got UTF-16", "save the file as UTF-8")
    return True


def _text(path: Path, shown: str, problems: Problems) -> str:
    """Return the whole file as text; nothing where a line of it is not UTF-8."""
    content = path.read_bytes().removeprefix(_BOM)
    if _is_utf16(content, shown, problems):
        return ""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        for _ in _lines(path, shown, problems):
            pass  # reads on for every line that is wrong
        return ""


def _list_items(text: str, start: int, shown: str, problems: Problems) -> Rows:
    """Yield the objects of a JSON list that begins at `start`, each with its line."""
    decoder = json.JSONDecoder()
    position = _skip(text, start + 1)
    line, counted = 1, 0
    closed = text[position : position + 1] == "]"
    while not closed:
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            problems.add(f"{shown}:{error.lineno}:{error.colno}", f"broken JSON: {error.msg}")
            return
        yield from _checked(value, f"{shown}:{line}", problems, escapes=_ESCAPE in text)
        position = _skip(text, position)
        closed = text[position : position + 1] == "]"
        if not closed and text[position : position + 1] != ",":
            at = json.JSONDecodeError("Expecting ',' or ']'", text, position)
            problems.add(f"{shown}:{at.lineno}:{at.colno}", f"broken JSON: {at.msg}")
            return
        if not closed:
            position = _skip(text, position + 1)
    rest = _skip(text, position + 1)
    if rest < len(text):
        at = json.JSONDecodeError("Extra data after the list", text, rest)
        problems.add(f"{shown}:{at.lineno}:{at.colno}", f"broken JSON: {at.msg}")


def _checked(value: Any, where: str, problems: Problems, *, escapes: bool) -> Rows:
    """Yield the row if it is an object of whole characters; only escapes can write half of one."""
    if not isinstance(value, dict):
        problems.add(where, f"expected an object with named fields, got {kind(value)}")
    elif escapes and _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        problems.add(where, "half a character (a lone \\ud800-\\udfff escape)", "write the whole character")
    else:
        yield value, where


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
