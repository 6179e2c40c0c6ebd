"""From the `data:` section to encoded rows, with the report of what is trained on."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peftctl.data.encode import EncodedRow, Encoder
from peftctl.data.formats import Example, to_examples
from peftctl.data.problems import Problems, wrong
from peftctl.data.sources import read_rows
from peftctl.data.supervision import SupervisionReport, refuse, report
from peftctl.errors import DataError
from peftctl.recipe.schema import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Examples:
    """Rows before encoding.

    Args:
        train: To train on.
        eval: Held out; none where the recipe holds none out.
    """

    train: list[Example]
    eval: list[Example]


def load_examples(data: DataSection, seed: int) -> Examples:
    """Read the rows of a recipe; `eval_fraction` holds out rows drawn by the seed, and both parts keep their order.

    Raises:
        DataError: A file or row is wrong, or there are too few rows to hold one out.
    """
    train = to_examples(read_rows(data.train or []), data)
    if data.eval is not None:
        return Examples(train, to_examples(read_rows(data.eval), data))
    if data.eval_fraction is None:
        return Examples(train, [])
    if len(train) < 2:
        raise wrong(
            "data.eval_fraction", f"expected at least 2 rows to hold one out, got {len(train)}", "name data.eval"
        )
    count = min(len(train) - 1, max(1, round(len(train) * data.eval_fraction)))
    held_out = set(random.Random(f"eval {seed}").sample(range(len(train)), count))
    return Examples(
        [example for i, example in enumerate(train) if i not in held_out],
        [example for i, example in enumerate(train) if i in held_out],
    )


def encode_all(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    data: DataSection,
    cache: Path | None = None,
) -> tuple[list[EncodedRow], SupervisionReport]:
    """Encode examples and drop rows without a token to train on.

    Args:
        examples: Of one format.
        tokenizer: Of the model.
        data: The section they came from.
        cache: Folder that keeps encoded rows between runs; None encodes anew.

    Raises:
        DataError: The tokenizer or its template does not fit, or more than `data.max_dropped` of the rows are dropped.
    """
    groups = _encoded(examples, tokenizer, data, cache)
    kept, found = report(groups, tokenizer)
    refuse(found, data)
    return kept, found


def _encoded(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, data: DataSection, cache: Path | None
) -> list[list[EncodedRow]]:
    encoder = Encoder(tokenizer, data)
    if cache is None:
        return _encode_each(examples, encoder)
    # numpy and safetensors are not needed without a cache.
    from peftctl.data.cache import cache_file, load_rows, save_rows

    file = cache_file(cache, examples, tokenizer, data)
    groups = load_rows(file, examples)
    if groups is None:
        groups = _encode_each(examples, encoder)
        save_rows(file, groups)
    return groups


def _encode_each(examples: Iterable[Example], encoder: Encoder) -> list[list[EncodedRow]]:
    problems = Problems()
    groups = []
    for example in examples:
        try:
            groups.append(encoder.encode(example))
        except DataError as error:
            problems.extend(error.problems)
    problems.raise_if_any()
    return groups


def fingerprint(rows: Iterable[EncodedRow]) -> str:
    """Return the sha256, in hex, of the tokens and labels of all rows in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(_key(row))
    return digest.hexdigest()


def overlap(train_rows: Iterable[EncodedRow], eval_rows: Iterable[EncodedRow]) -> int:
    """Return how many held-out rows are, token for token, training rows too."""
    known = {_key(row) for row in train_rows}
    return sum(_key(row) in known for row in eval_rows)


def _key(row: EncodedRow) -> bytes:
    """Return a digest of tokens and labels; the two lists are equally long, so their text is unambiguous."""
    return hashlib.sha256(repr((row.input_ids, row.labels)).encode()).digest()
