"""Batches are the same whichever way they come."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from hiertune.config import DataConfig
from hiertune.data import HierarchicalDataset, open_dataset, write_dataset
from hiertune.train.feed import Feed

SHARDS = [np.array([3, 1]), np.array([], dtype=np.int64), np.array([5]), np.arange(40)]


@pytest.fixture(scope="module")
def data(make_data):
    return make_data()


@pytest.fixture
def lazy(data, tmp_path):
    path = write_dataset(
        tmp_path / "data.h5", data.inputs.tensor.numpy(), data.labels, data.taxonomy, data.ids, data.split
    )
    return open_dataset(DataConfig(path=str(path), in_memory="never"))


def check(batches, data, change=lambda inputs: inputs):
    for (inputs, labels), rows in zip(batches, SHARDS, strict=True):
        assert torch.equal(inputs, change(data.inputs.rows(rows)))
        assert labels.tolist() == data.labels[rows].tolist()


def test_batches_in_memory_lazy_and_augmented(data, lazy):
    device = torch.device("cpu")
    check(Feed(data.inputs, data.labels, device).batches(SHARDS), data)
    check(Feed(lazy.inputs, lazy.labels, device).batches(SHARDS), data)
    negative = Feed(data.inputs, data.labels, device).batches(SHARDS, lambda inputs, rows: -inputs)
    check(negative, data, torch.neg)
    assert list(Feed(lazy.inputs, lazy.labels, device).batches([])) == []


class Watched:
    """Inputs that note who reads them, and how far."""

    def __init__(self, inputs):
        self.inputs, self.shape, self.dtype = inputs, inputs.shape, inputs.dtype
        self.readers, self.reads, self.read = set(), 0, threading.Semaphore(0)

    def rows(self, indices):
        self.readers.add(threading.current_thread().name)
        self.reads += 1
        self.read.release()
        return self.inputs.rows(indices)


def test_the_next_batch_is_read_by_one_thread_while_this_one_is_used(data):
    watched = Watched(data.inputs)
    source = HierarchicalDataset(watched, data.labels, data.ids, data.split, data.taxonomy)
    feed = Feed(source.inputs, source.labels, torch.device("cpu"))
    batches = feed.batches(SHARDS)
    next(batches)
    assert watched.read.acquire(timeout=10)
    assert watched.read.acquire(timeout=10)  # the second one, before it was asked for
    assert len(list(batches)) == 3
    assert watched.reads == 4
    assert len(watched.readers) == 1
    assert threading.current_thread().name not in watched.readers
    assert feed.seconds_waited > 0


def test_an_error_of_the_reader_comes_through(data):
    def fail(inputs, rows):
        raise ValueError("unreadable")

    with pytest.raises(ValueError, match="unreadable"):
        next(Feed(data.inputs, data.labels, torch.device("cpu")).batches(SHARDS, fail))


def test_two_threads_may_read_lazy_inputs(lazy, data):
    """A thread that reads ahead for a failed trial may still be at it when the next one begins."""
    lazy.inputs.block_rows, lazy.inputs.buffer_blocks = 4, 2  # so that blocks are replaced all the time
    wrong = []

    def read(seed):
        random = np.random.default_rng(seed)
        for _ in range(50):
            rows = random.integers(0, len(data), 30)
            if not torch.equal(lazy.inputs.rows(rows), data.inputs.rows(rows)):
                wrong.append(rows)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
