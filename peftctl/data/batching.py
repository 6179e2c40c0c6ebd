"""Which rows form a step, and how they are dealt to processes and micro-steps.

Order and grouping follow from (seed, epoch, global batch) alone, where global batch = batch_size * accumulation *
world_size: another split of the same global batch gives the same rows to every optimizer step. Rows of similar length
come together, which saves padding; the order of the steps stays random.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

# Global batches whose rows are sorted together: more saves more padding and mixes rows less.
_WINDOW = 32


class GroupedBatches:
    """A batch sampler: yields lists of row indices, the micro-batches of one process.

    Every row comes once an epoch, over all processes together: none is dropped or repeated. The last step takes what
    is left, spread evenly; where that is less than a row a micro-batch, some processes get empty lists, so that all
    take equally many micro-steps. One process never gets an empty list.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows a process and micro-step.
        accumulation: Micro-steps an optimizer step.
        seed: Seed of the run.
        world_size: Processes.
        rank: This process, from 0.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        accumulation: int,
        seed: int,
        world_size: int = 1,
        rank: int = 0,
    ):
        self.lengths = lengths
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.seed = seed
        self.world_size = world_size
        self.rank = rank
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of micro-batches of this process in an epoch."""
        full, left = divmod(len(self.lengths), self._global_batch)
        return full * self.accumulation + self._micro_steps(left)

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self._steps():
            count = self._micro_steps(len(rows)) * self.world_size
            # Neighbours in length: what the processes do at the same time takes about equally long.
            yield from _dealt(rows, count)[self.rank :: self.world_size]

    @property
    def _global_batch(self) -> int:
        return self.batch_size * self.accumulation * self.world_size

    def _micro_steps(self, rows: int) -> int:
        return -(-rows // (self.batch_size * self.world_size))

    def _steps(self) -> list[list[int]]:
        """Return the rows of every optimizer step of the epoch, each sorted by length, the incomplete one last."""
        rng = random.Random(f"{self.seed} {self.epoch}")
        order = list(range(len(self.lengths)))
        rng.shuffle(order)
        size = self._global_batch
        whole = len(order) - len(order) % size
        steps: list[list[int]] = []
        for begin in range(0, whole, _WINDOW * size):
            window = sorted(order[begin : min(begin + _WINDOW * size, whole)], key=self.lengths.__getitem__)
            steps.extend(window[i : i + size] for i in range(0, len(window), size))
        rng.shuffle(steps)
        left = sorted(order[whole:], key=self.lengths.__getitem__)
        return [*steps, left] if left else steps


def _dealt(rows: Sequence[int], count: int) -> list[list[int]]:
    """Cut rows into `count` consecutive parts whose sizes differ by one at most, empty ones last."""
    bounds = [-(-len(rows) * i // count) for i in range(count + 1)]
    return [list(rows[bounds[i] : bounds[i + 1]]) for i in range(count)]
