from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from hiertune.data import MemoryInputs
from hiertune.train.batches import BatchPlan, random_stream
from hiertune.train.workers import Workers

ROWS = st.integers(1, 60)
BATCH = st.integers(1, 20)


def plan(rows, batch_size, accumulation=1, seed=0):
    inputs = MemoryInputs(torch.zeros(1000, 1))
    return BatchPlan(inputs, 7 * np.arange(rows), batch_size, seed, accumulation)


def flat(steps):
    return np.concatenate([each.rows for step in steps for each in step.passes])


@given(ROWS, BATCH, st.integers(1, 4))
def test_every_row_comes_once_per_epoch(rows, batch_size, accumulation):
    steps = plan(rows, batch_size, accumulation).epoch(1)
    assert sorted(flat(steps)) == (7 * np.arange(rows)).tolist()
    assert len(steps) == plan(rows, batch_size, accumulation).steps_per_epoch


@given(ROWS, BATCH, st.integers(1, 4), st.integers(1, 5))
def test_workers_split_the_very_same_batches(rows, batch_size, accumulation, size):
    for step in plan(rows, batch_size, accumulation).epoch(3):
        for whole in step.passes:
            parts = [whole.shard(Workers(rank, size)).rows for rank in range(size)]
            np.testing.assert_array_equal(np.concatenate(parts), whole.rows)
            sizes = [len(part) for part in parts]
            assert max(sizes) - min(sizes) <= 1


@given(ROWS, st.integers(2, 10), st.integers(1, 4))
def test_accumulated_passes_hold_the_rows_of_one_large_batch(rows, batch_size, accumulation):
    small = plan(rows, batch_size, accumulation).epoch(2)
    large = plan(rows, batch_size * accumulation).epoch(2)
    assert len(small) == len(large)
    for several, one in zip(small, large, strict=True):
        np.testing.assert_array_equal(flat([several]), one.passes[0].rows)


def test_order_follows_from_seed_and_epoch():
    np.testing.assert_array_equal(flat(plan(50, 8).epoch(1)), flat(plan(50, 20).epoch(1)))
    orders = [flat(plan(50, 8, seed=seed).epoch(epoch)) for seed in (0, 1) for epoch in (1, 2)]
    assert len({tuple(order) for order in orders}) == 4


def test_last_batch_is_kept_but_a_single_row_joins_the_one_before():
    sizes = {n: [len(step.passes[0].rows) for step in plan(n, 4).epoch(1)] for n in (8, 9, 10, 1)}
    assert sizes == {8: [4, 4], 9: [4, 5], 10: [4, 4, 2], 1: [1]}
    assert [plan(n, 4).smallest_pass for n in (8, 9, 10, 1)] == [4, 4, 2, 1]
    assert [len(step.passes[0].rows) for step in plan(3, 1).epoch(1)] == [1, 1, 1]


def test_a_worker_may_get_no_rows():
    (whole,) = plan(3, 1).epoch(1)[0].passes
    assert sorted(len(whole.shard(Workers(rank, 2)).rows) for rank in (0, 1)) == [0, 1]


def test_random_streams_differ():
    seeds = {random_stream(seed, epoch, use) for seed in range(3) for epoch in range(3) for use in range(3)}
    assert len(seeds) == 27
