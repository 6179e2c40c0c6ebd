"""Rows from files, globs, folders or the hub, each with the place it came from.

Text formats have readers of our own, because an error must name the line; parquet and arrow are read by pyarrow, hub
ids by `datasets`. Nothing here knows what a row means.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftctl.data import readers
from peftctl.data.problems import Problems
from peftctl.errors import did_you_mean

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}")

_READERS: dict[str, Callable[[Path, str, Problems], Iterator[tuple[dict[str, Any], str]]]] = {
    ".jsonl": readers.jsonl,
    ".ndjson": readers.jsonl,
    ".json": readers.json_file,
    ".csv": readers.csv_file,
    ".tsv": readers.csv_file,
    ".txt": readers.txt,
    ".parquet": readers.parquet,
    ".arrow": readers.arrow,
}


@dataclass(frozen=True)
class Row:
    """One row as its file has it.

    Args:
        fields: Column -> value.
        where: `file:line`; the row's number, from 1, where the format has no lines.
    """

    fields: dict[str, Any]
    where: str


def read_rows(paths: str | list[str]) -> list[Row]:
    """Read all rows of one or several sources, in the order given; globs and folders in the order of their names.

    Args:
        paths: Files, globs, folders, or hub ids (`owner/name`, `owner/name:split`, `owner/name:config:split`;
            the split left out is `train`).

    Raises:
        DataError: A source is missing, empty or broken; up to ten problems are named, the others counted.
    """
    problems = Problems()
    rows = list(rows_one_by_one(paths, problems))
    problems.raise_if_any()
    return rows


def rows_one_by_one(paths: str | list[str], problems: Problems) -> Iterator[Row]:
    """Yield the rows of sources as `read_rows` returns them; what is wrong goes to `problems`.

    Of a file of JSON lines, text, parquet or arrow, only a part is in memory; of others the whole.
    """
    for source in [paths] if isinstance(paths, str) else paths:
        if _is_hub_id(source):
            yield from _hub_rows(source, problems)
            continue
        for file in _files(source, problems):
            yield from _file_rows(file, problems)
    if not paths:
        problems.add("data", "expected at least one file, got an empty list")


def local_files(sources: Sequence[str | list[str]], problems: Problems) -> list[Path] | None:
    """Return the files that sources stand for, in the order in which they are read; None where the hub has some."""
    names = [name for source in sources for name in ([source] if isinstance(source, str) else source)]
    if any(_is_hub_id(name) for name in names):
        return None
    return [file for name in names for file in _files(name, problems)]


def _is_hub_id(source: str) -> bool:
    looks_local = Path(source).suffix.lower() in _READERS or Path(source).exists()
    return not looks_local and _HUB_ID.fullmatch(source) is not None


def _file_rows(file: Path, problems: Problems) -> Iterator[Row]:
    shown = _shown(file)
    before = problems.count
    empty = True
    try:
        for fields, where in _READERS[file.suffix.lower()](file, shown, problems):
            empty = False
            yield Row(fields, where)
    except OSError as error:
        problems.add(shown, f"can't be read: {error.strerror or error}")
        return
    if empty and problems.count == before:
        problems.add(shown, "expected rows, but the file is empty")


def _files(source: str, problems: Problems) -> list[Path]:
    """Return the files that a path, glob or folder stands for."""
    path = Path(source)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in _READERS and not _hidden(file, path))
        if not found:
            problems.add(_shown(path), f"the folder holds no data file; known: {', '.join(_READERS)}")
        return found
    if path.exists():
        found = [path]
    else:
        found = sorted(Path(match) for match in glob.glob(source, recursive=True))
        found = [file for file in found if file.is_file()]
        if not found:
            what = "no file matches this pattern" if glob.has_magic(source) else "no such file"
            problems.add(_shown(path), what, _near(path))
    for file in found:
        if file.suffix.lower() not in _READERS:
            problems.add(_shown(file), f"unknown kind of file '{file.suffix}'", f"known: {', '.join(_READERS)}")
    return [file for file in found if file.suffix.lower() in _READERS]


def _near(path: Path) -> str:
    """Return a hint to a file of nearly that name beside it."""
    siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = did_you_mean(path.name, siblings)
    return hint if hint.startswith("did you mean") else ""


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _shown(path: Path) -> str:
    """Return the path as the user would type it from here."""
    absolute, here = os.path.abspath(path), os.getcwd()
    return os.path.relpath(absolute, here) if absolute.startswith(here + os.sep) else str(path)


def _hub_rows(source: str, problems: Problems) -> list[Row]:
    name, *parts = source.split(":")
    split = parts[-1] if parts else "train"
    config = parts[0] if len(parts) == 2 else None
    import datasets

    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        problems.add(source, f"no such file here, and the hub does not give it: {reason}")
        return []
    rows = [Row(dict(fields), f"{source}:{i}") for i, fields in enumerate(loaded, 1)]
    if not rows:
        problems.add(source, "expected rows, but the data set is empty")
    return rows
