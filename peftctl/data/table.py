"""Encoded training rows as an Arrow table on disk, memory-mapped: a run reads the rows of a batch, and no others.

Its name is a digest of all that the rows follow from: the bytes of the files, the `data:` section, the tokenizer, the
code that reads and encodes, and the versions of the libraries below it. So a run that finds its table neither reads nor
tokenises the files; it only hashes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
from pydantic import TypeAdapter

from peftctl.data.cache import tokenizer_content
from peftctl.data.encode import IGNORED, EncodedRow
from peftctl.data.problems import Problems
from peftctl.data.sources import local_files
from peftctl.data.supervision import SupervisionReport
from peftctl.recipe.schema import DataSection, Task

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase

LEAST_BYTES = 4 * 2**20
"""Of the files, all together: smaller ones are read again in the time that a table takes to open."""
_LIBRARIES = ("transformers", "tokenizers", "jinja2", "pyarrow")
_FLAGS = ("truncated", "paired", "prompt_cut", "classes")
_REPORT, _FINGERPRINT = b"report", b"fingerprint"
_NUMBERS = count()


class RowTable(Sequence[EncodedRow]):
    """The rows of a table, made when they are asked for.

    Args:
        table: As `write` has made it.
    """

    def __init__(self, table: pyarrow.Table):
        self.table = table
        self.ids, self.labels = (_Lists(table[name].chunks) for name in ("ids", "labels"))

    @overload
    def __getitem__(self, i: int) -> EncodedRow: ...

    @overload
    def __getitem__(self, i: slice) -> list[EncodedRow]: ...

    def __getitem__(self, i: int | slice) -> EncodedRow | list[EncodedRow]:
        """Return a row, or a list of them."""
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if i < 0:
            i += len(self)
        if not 0 <= i < len(self):
            raise IndexError(i)
        facts = {name: self.table[name][i].as_py() for name in ("where", "source", *_FLAGS)}
        return EncodedRow(self.ids[i], self.labels[i], **facts)

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self.table.num_rows)

    @cached_property
    def sizes(self) -> list[Size]:
        """The size of each row."""
        paired = self.table["paired"].to_numpy(zero_copy_only=False)
        inputs, supervised = self.ids.lengths, self.labels.supervised
        tokens = inputs + np.where(paired, self.labels.lengths, 0)
        return list(map(Size, inputs.tolist(), tokens.tolist(), supervised.tolist()))

    @property
    def keys(self) -> Iterator[bytes]:
        """A digest of the tokens and labels of each row."""
        return (key for chunk in self.table["key"].chunks for key in chunk.to_pylist())

    @property
    def report(self) -> SupervisionReport:
        """Supervision of the rows."""
        return _reports().validate_json(self.table.schema.metadata[_REPORT])

    @property
    def fingerprint(self) -> str:
        """What `dataset.fingerprint` gives for the rows."""
        text: bytes = self.table.schema.metadata[_FINGERPRINT]
        return text.decode()


class Size(NamedTuple):
    """Of a row: tokens that the (first) sequence has, tokens of all its sequences, labels that are trained on."""

    inputs: int
    tokens: int
    supervised: int


def sizes_of(rows: Sequence[EncodedRow]) -> list[Size]:
    """Return the size of each row."""
    if isinstance(rows, RowTable):
        return rows.sizes
    return [Size(len(row.input_ids), row.tokens, sum(label != IGNORED for label in row.labels)) for row in rows]


class _Lists:
    """Lists of numbers, cut out of a few long arrays."""

    def __init__(self, columns: Sequence[Any]):
        self.bounds = [column.offsets.to_numpy() for column in columns]
        self.values = [column.values.to_numpy() for column in columns]
        self.firsts = np.cumsum([0, *map(len, columns)]).tolist()

    def __getitem__(self, i: int) -> list[int]:
        part = bisect_right(self.firsts, i) - 1
        first, last = self.bounds[part][i - self.firsts[part] :][:2]
        numbers: list[int] = self.values[part][first:last].tolist()
        return numbers

    @property
    def lengths(self) -> np.ndarray:
        return np.concatenate([np.diff(bounds) for bounds in self.bounds])

    @property
    def supervised(self) -> np.ndarray:
        """How many numbers of each list are trained on."""
        sums = (np.concatenate([[0], np.cumsum(values != IGNORED)]) for values in self.values)
        return np.concatenate([np.diff(sums[bounds]) for sums, bounds in zip(sums, self.bounds, strict=True)])


def table_file(root: Path, data: DataSection, tokenizer: PreTrainedTokenizerBase, task: Task, seed: int) -> Path | None:
    """Return where the training rows of a section are kept.

    None where they are not worth it, come from the hub, or can't be read, which whoever reads them will tell.
    """
    places = [data.train] if data.sources is None else [source.path for source in data.sources]
    files = local_files([place for place in places if place is not None], Problems())
    digest = hashlib.sha256()
    try:
        if files is None or sum(file.stat().st_size for file in files) < LEAST_BYTES:
            return None
        for file in files:
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    except OSError:
        return None
    sources = sorted(Path(__file__).parent.glob("*.py"))
    code = {source.name: hashlib.sha256(source.read_bytes()).hexdigest() for source in sources}
    versions = [version(name) for name in _LIBRARIES]
    for part in (data.model_dump(mode="json"), task, seed, code, versions, tokenizer_content(tokenizer)):
        digest.update(json.dumps(part, sort_keys=True).encode())
    return root / "rows" / f"{digest.hexdigest()}.arrow"


def read(file: Path) -> RowTable | None:
    """Return the rows of a file; None where there is none, or not one of ours."""
    import pyarrow

    with contextlib.suppress(OSError, pyarrow.ArrowException, KeyError):
        return RowTable(opened(file))
    return None


def opened(file: Path) -> pyarrow.Table:
    """Return a table that is mapped into memory."""
    import pyarrow

    return pyarrow.ipc.open_file(pyarrow.memory_map(str(file))).read_all()


def write(file: Path, parts: Iterable[pyarrow.Table], report: SupervisionReport, fingerprint: str) -> None:
    """Write rows aside and rename.

    Args:
        file: Where to.
        parts: The rows, as `batch` makes them.
        report: About them.
        fingerprint: Of all of them.

    Raises:
        OSError: The disk is full, or the folder can't be written to.
    """
    about = {_REPORT: _reports().dump_json(report), _FINGERPRINT: fingerprint.encode()}
    with aside(file) as place:
        with writer(place, schema().with_metadata(about)) as sink:
            for part in parts:
                sink.write_table(part)
        os.replace(place, file)


@contextlib.contextmanager
def aside(file: Path) -> Iterator[Path]:
    """Yield a name beside a file for this process alone; what still has that name in the end is removed."""
    place = file.with_name(f".{file.name}.{os.getpid()}.{next(_NUMBERS)}")
    try:
        yield place
    finally:
        place.unlink(missing_ok=True)


@contextlib.contextmanager
def writer(file: Path, form: pyarrow.Schema) -> Iterator[Any]:
    """Yield what writes parts of a table to a file."""
    import pyarrow

    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_file(sink, form) as parts:
        yield parts


def schema() -> pyarrow.Schema:
    """Return the columns of a table."""
    import pyarrow

    numbers = pyarrow.large_list(pyarrow.int32())
    columns = {"ids": numbers, "labels": numbers, "where": pyarrow.large_string(), "source": pyarrow.int32()}
    return pyarrow.schema({**columns, "key": pyarrow.binary(32), **dict.fromkeys(_FLAGS, pyarrow.bool_())})


def batch(rows: Sequence[EncodedRow], keys: Iterable[bytes]) -> pyarrow.RecordBatch:
    """Return rows without wrong answers as a part of a table.

    Args:
        rows: Of any number.
        keys: A digest of each.
    """
    import pyarrow

    columns = {
        "ids": _lists([row.input_ids for row in rows]),
        "labels": _lists([row.labels for row in rows]),
        "key": pyarrow.array(keys, pyarrow.binary(32)),
    }
    form = schema()
    for name in form.names:
        if name not in columns:
            columns[name] = pyarrow.array([getattr(row, name) for row in rows], form.field(name).type)
    return pyarrow.RecordBatch.from_arrays([columns[name] for name in form.names], schema=form)


def _lists(lists: Sequence[list[int]]) -> Any:
    import pyarrow

    values = np.concatenate([np.zeros(0, np.int32), *(np.array(numbers, dtype=np.int32) for numbers in lists)])
    return pyarrow.LargeListArray.from_arrays(np.cumsum([0, *map(len, lists)]), values)


def _reports() -> TypeAdapter[SupervisionReport]:
    return TypeAdapter(SupervisionReport)
