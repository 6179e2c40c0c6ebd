"""From examples to encoded rows, with the report of what is trained on."""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from peftctl.data.encode import EncodedRow
from peftctl.data.examples import Examples, holds_out
from peftctl.data.formats import Example, section_of
from peftctl.data.pairs import encoder_of
from peftctl.data.problems import Problems
from peftctl.data.supervision import SupervisionReport, refuse
from peftctl.data.tally import Marks, Tally
from peftctl.data.workers import encode_each
from peftctl.recipe.schema import DataSection, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftctl.data.table import RowTable


def training_rows(
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    data: DataSection,
    cache: Path | None,
    task: Task,
    seed: int,
    workers: int = 1,
) -> tuple[Sequence[EncodedRow], SupervisionReport, str]:
    """Return the rows to train on, what is known about them, and their fingerprint.

    Those of large files lie in a table on disk, see `table.py`; where it is there already, `examples.train` is not
    looked at.

    Args:
        examples: As `load_examples` gives them.
        tokenizer: Of the model.
        data: The section they came from; for a classifier with its labels.
        cache: Folder that keeps encoded rows between runs; None encodes anew.
        task: What the model does.
        seed: That `examples` were drawn by.
        workers: Processes that encode.

    Raises:
        DataError: As `encode_all`.
    """
    if cache is not None:
        found = _table(examples, tokenizer, data, cache, task, seed, workers)
        if found is not None:
            return found, found.report, found.fingerprint
    rows, known = encode_all(examples.train, tokenizer, data, cache, task, workers)
    return rows, known, fingerprint(rows)


def _table(
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    data: DataSection,
    cache: Path,
    task: Task,
    seed: int,
    workers: int,
) -> RowTable | None:
    """Return the rows of large files, from the table that there is or from a new one; None where there can't be one."""
    # pyarrow is not needed without a table.
    from peftctl.data import stream, table

    file = table.table_file(cache, data, tokenizer, task, seed)
    if file is None:
        return None
    if (found := table.read(file)) is not None:
        refuse(found.report, data)
        return found
    problems = Problems()
    in_memory = holds_out(data)
    parts = stream.parts_of(examples.train) if in_memory else stream.parts_of_files(data, seed, problems)
    with contextlib.suppress(OSError):  # without a table, rows take memory and the next run as much time, no more
        if stream.write_table(file, parts, problems, tokenizer, data, task, workers):
            return table.read(file)
    return None


def encode_all(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    data: DataSection,
    cache: Path | None = None,
    task: Task = "causal_lm",
    workers: int = 1,
) -> tuple[list[EncodedRow], SupervisionReport]:
    """Encode examples and drop rows without a token to train on.

    Args:
        examples: Of one format.
        tokenizer: Of the model.
        data: The section they came from; for a classifier with its labels, see `classes.with_labels`.
        cache: Folder that keeps encoded rows between runs; None encodes anew.
        task: What the model does.
        workers: Processes that encode.

    Raises:
        DataError: The tokenizer or its template does not fit, or more than `data.max_dropped` of the rows are dropped.
    """
    groups = _encoded_by_source(examples, tokenizer, data, cache, task, workers)
    tally, marks = Tally(), Marks.of(tokenizer)
    times = Counter(map(id, examples))
    for group, example in zip(groups, examples, strict=True):
        if copies := times.pop(id(example), 0):
            tally.count(group, example.source, marks, copies)
    found = tally.report(tokenizer, data.sources, data.labels or ())
    refuse(found, data)
    return [row for group in groups for row in group if row.dropped_reason is None], found


def _encoded_by_source(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    data: DataSection,
    cache: Path | None,
    task: Task,
    workers: int,
) -> list[list[EncodedRow]]:
    """Return the rows of each example; copies of an example share theirs, and sources are cached apart."""
    distinct = {id(example): example for example in examples}
    rows: dict[int, list[EncodedRow]] = {}
    for source in dict.fromkeys(example.source for example in examples):
        own = [example for example in distinct.values() if example.source == source]
        groups = _encoded(own, tokenizer, section_of(data, source), cache, task, workers)
        if source is not None:
            groups = [[replace(row, source=source) for row in group] for group in groups]
        rows.update(zip(map(id, own), groups, strict=True))
    return [rows[id(example)] for example in examples]


def _encoded(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    data: DataSection,
    cache: Path | None,
    task: Task,
    workers: int,
) -> list[list[EncodedRow]]:
    encoder = encoder_of(task, tokenizer, data)
    if cache is None:
        return encode_each(examples, encoder, workers)
    # numpy and safetensors are not needed without a cache.
    from peftctl.data.cache import cache_file, load_rows, save_rows

    file = cache_file(cache, examples, tokenizer, data, task)
    groups = load_rows(file, examples)
    if groups is None:
        groups = encode_each(examples, encoder, workers)
        save_rows(file, groups)
    return groups


def fingerprint(rows: Iterable[EncodedRow]) -> str:
    """Return the sha256, in hex, of the tokens and labels of all rows in their order, wrong answers included."""
    return digest_of(key_of(each) for row in rows for each in (row, *row.wrong))


def overlap(train_rows: Sequence[EncodedRow], eval_rows: Iterable[EncodedRow]) -> int:
    """Return how many held-out rows are, token for token, training rows too."""
    from peftctl.data.table import RowTable

    held_out = list(map(key_of, eval_rows))
    asked = set(held_out)
    keys = train_rows.keys if isinstance(train_rows, RowTable) else map(key_of, train_rows)
    known = {key for key in keys if key in asked}
    return sum(key in known for key in held_out)


def key_of(row: EncodedRow) -> bytes:
    """Return a digest of tokens and labels."""
    return hashlib.sha256(repr((row.input_ids, row.labels)).encode()).digest()


def digest_of(keys: Iterable[bytes]) -> str:
    """Return one digest of those of rows."""
    digest = hashlib.sha256()
    for key in keys:
        digest.update(key)
    return digest.hexdigest()
