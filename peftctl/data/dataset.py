"""From the `data:` section to encoded rows, with the report of what is trained on."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftctl.data.encode import EncodedRow
from peftctl.data.formats import Example, section_of, to_examples
from peftctl.data.pairs import encoder_of
from peftctl.data.problems import Problems, wrong
from peftctl.data.sources import read_rows
from peftctl.data.supervision import SupervisionReport, refuse, report
from peftctl.data.workers import encode_each
from peftctl.errors import DataError
from peftctl.recipe.schema import DataSection, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Late(Sequence[Example]):
    """Examples that are read when somebody looks at them.

    Args:
        read: Returns them.
    """

    def __init__(self, read: Callable[[], list[Example]]):
        self._read = read

    @cached_property
    def _examples(self) -> list[Example]:
        return self._read()

    def __getitem__(self, i: Any) -> Any:
        """Return an example, or a list of them."""
        return self._examples[i]

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._examples)


@dataclass(frozen=True)
class Examples:
    """Rows before encoding.

    Args:
        train: To train on in an epoch; of `data.sources`, the copies of a row are one object.
        eval: Held out; none where the recipe holds none out.
    """

    train: Sequence[Example]
    eval: list[Example]

    @property
    def distinct(self) -> Sequence[Example]:
        """Training rows, each once."""
        return Late(lambda: list({id(example): example for example in self.train}.values()))


def load_examples(data: DataSection, seed: int) -> Examples:
    """Read the rows of a recipe; `eval_fraction` holds out rows drawn by the seed, and both parts keep their order.

    Held-out rows are drawn before the weights of `data.sources` repeat any row, so that no copy of one is trained on.
    Where no training row is held out, these are read when somebody looks at them.

    Raises:
        DataError: A file or row is wrong, or there are too few rows to hold one out.
    """
    if data.eval is None and data.eval_fraction is not None:
        train, held_out = _split(_read(data), data.eval_fraction, seed)
        return Examples(_weighted(train, data, seed), held_out)
    held_out = [] if data.eval is None else to_examples(read_rows(data.eval), data)
    return Examples(Late(lambda: _weighted(_read(data), data, seed)), held_out)


def _read(data: DataSection) -> list[Example]:
    """Return every training row once, those of `data.sources` in the order of the sources."""
    if data.sources is None:
        return to_examples(read_rows(data.train or []), data)
    problems = Problems()
    examples: list[Example] = []
    for i, source in enumerate(data.sources):
        try:
            examples += to_examples(read_rows(source.path), section_of(data, i), i)
        except DataError as error:
            problems.extend(error.problems)
    problems.raise_if_any()
    return examples


def _split(examples: list[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    if len(examples) < 2:
        raise wrong(
            "data.eval_fraction", f"expected at least 2 rows to hold one out, got {len(examples)}", "name data.eval"
        )
    count = min(len(examples) - 1, max(1, round(len(examples) * fraction)))
    held_out = set(random.Random(f"eval {seed}").sample(range(len(examples)), count))
    return (
        [example for i, example in enumerate(examples) if i not in held_out],
        [example for i, example in enumerate(examples) if i in held_out],
    )


def _weighted(examples: list[Example], data: DataSection, seed: int) -> list[Example]:
    """Repeat the rows of each source by the whole part of its weight, and draw the fraction's share of them once more.

    The same rows are drawn for every epoch, so that one list describes them all; a source gives at least one row.
    """
    if data.sources is None:
        return examples
    chosen: list[Example] = []
    for i, source in enumerate(data.sources):
        own = [example for example in examples if example.source == i]
        copies, fraction = divmod(source.weight, 1)
        count = max(round(fraction * len(own)), min(len(own), 0 if copies else 1))
        drawn = set(random.Random(f"source {i} {seed}").sample(range(len(own)), count))
        chosen += own * int(copies) + [example for j, example in enumerate(own) if j in drawn]
    return chosen


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
    file = None
    if cache is not None:
        # pyarrow is not needed without a table.
        from peftctl.data import table

        file = table.table_file(cache, data, tokenizer, task, seed)
        if file is not None and (found := table.read(file)) is not None:
            known = found.report
            refuse(known, data)
            return found, known, found.fingerprint
    if file is None or any(example.wrong_answers for example in examples.train):
        rows, found_report = encode_all(examples.train, tokenizer, data, cache, task, workers)
        return rows, found_report, fingerprint(rows)
    rows, found_report = encode_all(examples.train, tokenizer, data, None, task, workers)
    keys = list(map(_key, rows))
    mark = _digest(keys)
    table.write(file, rows, found_report, mark, keys)
    return table.read(file) or rows, found_report, mark


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
    origins = [example.source for example in examples]
    kept, found = report(groups, tokenizer, origins, data.sources, data.labels or ())
    refuse(found, data)
    return kept, found


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
    return _digest(_key(each) for row in rows for each in (row, *row.wrong))


def overlap(train_rows: Sequence[EncodedRow], eval_rows: Iterable[EncodedRow]) -> int:
    """Return how many held-out rows are, token for token, training rows too."""
    from peftctl.data.table import RowTable

    known = set(train_rows.keys if isinstance(train_rows, RowTable) else map(_key, train_rows))
    return sum(_key(row) in known for row in eval_rows)


def _key(row: EncodedRow) -> bytes:
    """Return a digest of tokens and labels."""
    return hashlib.sha256(repr((row.input_ids, row.labels)).encode()).digest()


def _digest(keys: Iterable[bytes]) -> str:
    """Return one digest of those of rows."""
    digest = hashlib.sha256()
    for key in keys:
        digest.update(key)
    return digest.hexdigest()
