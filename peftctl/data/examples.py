"""From the `data:` section to examples: which rows are trained on, how often, and which are held out."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from peftctl.data.formats import Example, section_of, to_examples
from peftctl.data.problems import Problems, wrong
from peftctl.data.sources import read_rows
from peftctl.errors import DataError
from peftctl.recipe.schema import DataSection


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
    if holds_out(data):
        train, held_out = _split(_read(data), data.eval_fraction or 0, seed)
        return Examples(_weighted(train, data, seed), held_out)
    held_out = [] if data.eval is None else to_examples(read_rows(data.eval), data)
    return Examples(Late(lambda: _weighted(_read(data), data, seed)), held_out)


def holds_out(data: DataSection) -> bool:
    """Whether held-out rows are drawn from the training rows, which must all be read for it."""
    return data.eval is None and data.eval_fraction is not None


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
        copies, drawn = draws(source.weight, len(own), i, seed)
        chosen += own * copies + [example for j, example in enumerate(own) if j in drawn]
    return chosen


def draws(weight: float, count: int, source: int, seed: int) -> tuple[int, set[int]]:
    """Return how often an epoch has every row of a source, and which of its rows it has once more.

    Args:
        weight: Of the source.
        count: Its rows.
        source: Its number.
        seed: Of the run.
    """
    copies, fraction = divmod(weight, 1)
    share = max(round(fraction * count), min(count, 0 if copies else 1))
    return int(copies), set(random.Random(f"source {source} {seed}").sample(range(count), share))
