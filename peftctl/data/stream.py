"""Rows of large files become a table part by part: read here, encoded by several processes, never all in memory.

A first table has every row once, in the order of the files, as far as their number and the draws of `data.sources`
allow to say which are wanted; the final one, written from it, repeats rows as an epoch does and carries the report.
"""

from __future__ import annotations

import contextlib
from array import array
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from peftctl.data import table, workers
from peftctl.data.dataset import digest_of, key_of
from peftctl.data.encode import EncodedRow
from peftctl.data.examples import draws
from peftctl.data.formats import Example, section_of, to_examples
from peftctl.data.pairs import RowEncoder, encoder_of
from peftctl.data.problems import Problems
from peftctl.data.sources import Row, rows_one_by_one
from peftctl.data.supervision import refuse
from peftctl.data.tally import Marks, Tally
from peftctl.errors import DataError, Problem
from peftctl.recipe.schema import DataSection, Task

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase

ROWS = 8192
"""That are copied at a time."""


@dataclass(frozen=True)
class Part:
    """Examples of one source that are encoded together.

    Args:
        source: See `Example.source`.
        examples: Each of them once.
        copies: How often an epoch has each of them.
        again: Positions of those that it has once more.
    """

    source: int | None
    examples: Sequence[Example]
    copies: int = 1
    again: frozenset[int] = frozenset()


@dataclass
class _Piece:
    """Rows of the first table that are repeated alike.

    Args:
        source: Whose they are.
        copies: How often.
        first: The first of them.
        end: The one behind the last.
        again: Those that come once more behind.
    """

    source: int | None
    copies: int
    first: int
    end: int
    again: array[int] = field(default_factory=lambda: array("q"))


class _Encoded(NamedTuple):
    source: int | None
    copies: int
    batch: pyarrow.RecordBatch
    again: list[int]
    tally: Tally
    problems: list[Problem]
    choices: bool


def write_table(
    file: Path, parts: Iterable[Part], problems: Problems, tokenizer: PreTrainedTokenizerBase, data: DataSection,
    task: Task, count: int,
) -> bool:  # fmt: skip
    """Write the table of some rows; return whether it could be, which rows with wrong answers can't.

    Args:
        file: Where to.
        parts: The rows.
        problems: What reading them finds; when there are some, nothing more is encoded.
        tokenizer: Of the model.
        data: The section; for a classifier with its labels.
        task: What the model does.
        count: Processes that encode.

    Raises:
        DataError: Rows are wrong, or too many have nothing to train on.
        OSError: The table can't be written.
    """
    sources = [None] if data.sources is None else range(len(data.sources))
    encoders = {source: encoder_of(task, tokenizer, section_of(data, source)) for source in sources}
    work = partial(_encode, encoders=encoders, marks=Marks.of(tokenizer))
    tally, pieces = Tally(), list[_Piece]()
    file.parent.mkdir(parents=True, exist_ok=True)
    with table.aside(file) as first_table, contextlib.closing(_while_right(parts, problems)) as right:
        with table.writer(first_table, table.schema()) as sink:
            for encoded in workers.mapped(work, right, count):
                if encoded.choices:
                    return False
                problems.extend(encoded.problems)
                tally.add(encoded.tally)
                _note(pieces, encoded)
                sink.write_batch(encoded.batch)
        problems.raise_if_any()
        report = tally.report(tokenizer, data.sources, data.labels or ())
        refuse(report, data)
        rows = table.opened(first_table)
        mark = digest_of(key for part in _slices(rows.select(["key"]), pieces) for key in part["key"].to_pylist())
        table.write(file, _slices(rows, pieces), report, mark)
    return True


def parts_of_files(data: DataSection, seed: int, problems: Problems) -> Iterator[Part]:
    """Read the training rows of a section, those of `data.sources` source by source.

    Args:
        data: The section.
        seed: What rows of a source with a fraction in its weight are drawn by.
        problems: Takes what is wrong.
    """
    if data.sources is None:
        for examples in _examples(data.train or [], data, None, problems):
            yield Part(None, examples)
        return
    for i, source in enumerate(data.sources):
        # Which rows are drawn depends on how many there are.
        known = sum(1 for _ in rows_one_by_one(source.path, Problems())) if source.weight % 1 else 0
        copies, drawn = draws(source.weight, known, i, seed)
        first = 0
        for examples in _examples(source.path, section_of(data, i), i, problems):
            again = frozenset(j for j in range(len(examples)) if first + j in drawn)
            first += len(examples)
            if copies:
                yield Part(i, examples, copies, again)
            elif again:
                yield Part(i, [examples[j] for j in sorted(again)])


def parts_of(examples: Iterable[Example]) -> Iterator[Part]:
    """Cut examples that are in memory, copies of one being one object, into parts."""
    for source, group in groupby(examples, key=lambda example: example.source):
        own = list(group)
        times = Counter(map(id, own))
        distinct = list({id(example): example for example in own}.values())
        copies = min(times.values())
        for first in range(0, len(distinct), workers.PART):
            part = distinct[first : first + workers.PART]
            again = frozenset(j for j, example in enumerate(part) if times[id(example)] > copies)
            yield Part(source, part, copies, again)


def _examples(
    paths: str | list[str], data: DataSection, source: int | None, problems: Problems
) -> Iterator[list[Example]]:
    to_examples([], data, source)  # what is wrong with the section is told once
    rows: Iterator[Row] = rows_one_by_one(paths, problems)
    while part := list(islice(rows, workers.PART)):
        try:
            yield to_examples(part, data, source)
        except DataError as error:
            problems.extend(error.problems)


def _while_right(parts: Iterable[Part], problems: Problems) -> Generator[Part]:
    """Yield parts; behind the first problem read on, for the others, and yield none."""
    for part in parts:
        if not problems.count:
            yield part


def _encode(part: Part, encoders: dict[int | None, RowEncoder], marks: Marks) -> _Encoded:
    groups, problems = workers.encode(part.examples, encoders[part.source])
    tally, rows, again = Tally(), list[EncodedRow](), list[int]()
    for i, group in enumerate(groups):
        tally.count(group, part.source, marks, part.copies + (i in part.again))
        kept = [replace(row, source=part.source) for row in group if row.dropped_reason is None]
        again += range(len(rows), len(rows) + len(kept)) if i in part.again else ()
        rows += kept
    choices = any(example.wrong_answers for example in part.examples)
    return _Encoded(part.source, part.copies, table.batch(rows, map(key_of, rows)), again, tally, problems, choices)


def _note(pieces: list[_Piece], encoded: _Encoded) -> None:
    """Add the rows of a part to the piece that they belong to."""
    first = pieces[-1].end if pieces else 0
    if not pieces or pieces[-1].source != encoded.source:
        pieces.append(_Piece(encoded.source, encoded.copies, first, first))
    pieces[-1].again.extend(first + i for i in encoded.again)
    pieces[-1].end += encoded.batch.num_rows


def _slices(rows: pyarrow.Table, pieces: Sequence[_Piece]) -> Iterator[pyarrow.Table]:
    """Yield the rows of an epoch, a few thousand at a time."""
    for piece in pieces:
        again = np.array(piece.again)
        for number in range(piece.copies + bool(piece.again)):
            for first in range(piece.first, piece.end, ROWS):
                end = min(first + ROWS, piece.end)
                part = rows.slice(first, end - first).combine_chunks()
                if number == piece.copies:
                    low, high = np.searchsorted(again, [first, end])
                    part = part.take(again[low:high] - first)
                if part.num_rows:
                    yield part
