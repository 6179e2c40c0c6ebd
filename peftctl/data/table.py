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
from collections.abc import Iterable, Sequence
from functools import cached_property
from importlib.metadata import version
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


class RowTable(Sequence[EncodedRow]):
    """The rows of a table, made when they are asked for.

    Args:
        table: As `write` has made it.
    """

    def __init__(self, table: pyarrow.Table):
        self.table = table.combine_chunks()  # which copies nothing, as there is only one
        self.ids, self.labels = (_Lists(self.table[name].chunk(0)) for name in ("ids", "labels"))

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
        inputs, supervised = self.ids.lengths, self.labels.counts(self.labels.values != IGNORED)
        tokens = inputs + np.where(paired, self.labels.lengths, 0)
        return list(map(Size, inputs.tolist(), tokens.tolist(), supervised.tolist()))

    @cached_property
    def keys(self) -> list[bytes]:
        """A digest of the tokens and labels of each row."""
        keys: list[bytes] = self.table["key"].to_pylist()
        return keys

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
    """Lists of numbers, cut out of one array."""

    def __init__(self, column: Any):
        self.bounds = column.offsets.to_numpy()
        self.values = column.values.to_numpy()

    def __getitem__(self, i: int) -> list[int]:
        return self.values[self.bounds[i] : self.bounds[i + 1]].tolist()

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.bounds)

    def counts(self, chosen: np.ndarray) -> np.ndarray:
        """Return how many numbers of each list are chosen."""
        return np.diff(np.concatenate([[0], np.cumsum(chosen)])[self.bounds])


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
        return RowTable(pyarrow.ipc.open_file(pyarrow.memory_map(str(file))).read_all())
    return None


def write(
    file: Path,
    rows: Sequence[EncodedRow],
    report: SupervisionReport,
    fingerprint: str,
    keys: Sequence[bytes],
) -> None:
    """Write rows aside and rename; a table that can't be written costs time in the next run and nothing else.

    Args:
        file: Where to.
        rows: That are trained on, without wrong answers.
        report: About them.
        fingerprint: Of all of them.
        keys: A digest of each.
    """
    import pyarrow

    columns = {
        "ids": _lists(row.input_ids for row in rows),
        "labels": _lists(row.labels for row in rows),
        "where": pyarrow.array((row.where for row in rows), pyarrow.large_string()),
        "source": pyarrow.array((row.source for row in rows), pyarrow.int32()),
        "key": pyarrow.array(keys, pyarrow.binary(32)),
        **{flag: pyarrow.array((getattr(row, flag) for row in rows), pyarrow.bool_()) for flag in _FLAGS},
    }
    about = {_REPORT: _reports().dump_json(report), _FINGERPRINT: fingerprint.encode()}
    table = pyarrow.table(columns).replace_schema_metadata(about)
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    with contextlib.suppress(OSError, pyarrow.ArrowException):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with pyarrow.OSFile(str(aside), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
            os.replace(aside, file)
        finally:
            aside.unlink(missing_ok=True)


def _lists(lists: Iterable[list[int]]) -> Any:
    import pyarrow

    lengths, parts = [0], []
    for numbers in lists:
        parts.append(np.array(numbers, dtype=np.int32))
        lengths.append(len(numbers))
    values = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
    return pyarrow.LargeListArray.from_arrays(np.cumsum(lengths), values)


def _reports() -> TypeAdapter[SupervisionReport]:
    return TypeAdapter(SupervisionReport)
