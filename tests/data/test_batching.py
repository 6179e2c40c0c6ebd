"""Grouping must not depend on how a global batch is split, and must lose nothing."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftctl.data.batching import GroupedBatches

LENGTHS = st.lists(st.integers(1, 500), min_size=1, max_size=300)


def micro_batches(lengths, batch_size, accumulation, world_size, seed=0, epoch=0):
    """Micro-batches of every rank."""
    found = []
    for rank in range(world_size):
        sampler = GroupedBatches(lengths, batch_size, accumulation, seed, world_size, rank)
        sampler.set_epoch(epoch)
        found.append(list(sampler))
        assert len(sampler) == len(found[-1])
    return found


def steps(lengths, batch_size, accumulation, world_size, **keys):
    """Set of rows of every optimizer step."""
    ranks = micro_batches(lengths, batch_size, accumulation, world_size, **keys)
    rows = []
    for begin in range(0, len(ranks[0]), accumulation):
        rows.append({row for rank in ranks for batch in rank[begin : begin + accumulation] for row in batch})
    return rows


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(0, 3), st.integers(0, 3))
def test_split_of_the_global_batch_does_not_change_steps(lengths, seed, epoch):
    splits = [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 2, 4), (1, 8, 1), (2, 4, 1), (1, 1, 8)]
    first, *others = (steps(lengths, *split, seed=seed, epoch=epoch) for split in splits)
    assert all(other == first for other in others)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_every_row_once_and_ranks_in_step(lengths, batch_size, accumulation, world_size):
    ranks = micro_batches(lengths, batch_size, accumulation, world_size)
    rows = [row for rank in ranks for batch in rank for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert len({len(rank) for rank in ranks}) == 1
    assert max(len(batch) for rank in ranks for batch in rank) <= batch_size
    full = len(lengths) // (batch_size * accumulation * world_size) * accumulation
    assert all(len(batch) == batch_size for rank in ranks for batch in rank[:full])
    if world_size == 1:
        assert all(batch for batch in ranks[0])


def test_epochs_and_seeds_differ_and_repeat():
    lengths = [random.Random(0).randint(1, 99) for _ in range(100)]
    orders = {(s, e): str(micro_batches(lengths, 4, 2, 1, seed=s, epoch=e)) for s in (0, 1) for e in (0, 1, 2)}
    assert len(set(orders.values())) == 6
    assert orders[1, 2] == str(micro_batches(lengths, 4, 2, 1, seed=1, epoch=2))


def test_padding_is_small_and_ranks_work_on_similar_lengths():
    rng = random.Random(0)
    lengths = [int(rng.lognormvariate(5, 0.8)) + 1 for _ in range(2000)]

    def padded(batches):
        return sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)

    first, second = micro_batches(lengths, 8, 2, 2)
    shuffled = rng.sample(range(2000), 2000)
    at_random = padded(shuffled[i : i + 8] for i in range(0, 2000, 8))
    grouped = padded([*first, *second])
    assert sum(lengths) <= grouped < 1.1 * sum(lengths) < at_random / 1.5
    longest = [(max(lengths[i] for i in a), max(lengths[i] for i in b)) for a, b in zip(first, second, strict=True)]
    assert sum(abs(a - b) for a, b in longest) < 0.1 * sum(a for a, _ in longest)


def test_steps_are_not_sorted_by_length():
    lengths = list(range(1, 3201))
    means = [sum(lengths[i] for i in rows) / len(rows) for rows in steps(lengths, 10, 1, 1)]
    rising = sum(b > a for a, b in pairwise(means))
    assert 100 < rising < 220  # of 319; sorted would be 319


@pytest.mark.parametrize(("rows", "expected"), [(1, [[1], [0]]), (3, [[1, 0], [1, 1]]), (2, [[1], [1]])])
def test_fewer_rows_than_ranks_need(rows, expected):
    ranks = micro_batches([5] * rows, 1, 4, 2)
    assert sorted([len(batch) for batch in rank] for rank in ranks) == sorted(expected)
