from __future__ import annotations

import dataclasses
import fcntl
import multiprocessing
import pickle
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertune.config import DataConfig
from hiertune.data import MemoryInputs, dataset, open_dataset, read_taxonomy, write_dataset
from hiertune.data.dataset import Hdf5Inputs
from hiertune.data.format import read_contents
from hiertune.errors import InputError
from hiertune.taxonomy import Taxonomy

N, D, BLOCK, SLOTS = 103, 5, 4, 6


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    return np.random.default_rng(0).random((N, D), dtype=np.float32)


@pytest.fixture(scope="module")
def path(tmp_path_factory, values) -> Path:
    taxonomy = Taxonomy.from_parents(["a"], [[-1, -1]])
    labels = np.arange(N)[:, None] % 2
    file = tmp_path_factory.mktemp("data") / "a.h5"
    return write_dataset(file, values, labels, taxonomy, [f"id {i}" for i in range(N)])


def lazy_inputs(path: Path) -> Hdf5Inputs:
    """Blocks of 4 rows, 6 of them in memory: 26 blocks in all, the last one shorter."""
    inputs = Hdf5Inputs(path, read_contents(path))
    inputs.block_rows, inputs.buffer_blocks = BLOCK, SLOTS
    return inputs


def counted(inputs: Hdf5Inputs) -> Counter:
    """Counts how often each block is read from now on."""
    reads: Counter = Counter()
    read_block = inputs.read_block

    def counting(number: int, out: np.ndarray) -> None:
        reads[number] += 1
        read_block(number, out)

    inputs.read_block = counting  # type: ignore[method-assign]
    return reads


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------ rows


@settings(deadline=None)
@given(batches=st.lists(st.lists(st.integers(0, N - 1), max_size=80), max_size=6))
def test_lazy_rows_are_those_in_memory(path, values, batches):
    inputs = lazy_inputs(path)
    memory = MemoryInputs(torch.from_numpy(values))
    for batch in batches:  # any order, repeats, more blocks than the buffer holds
        indices = np.array(batch, np.int64)
        rows = inputs.rows(indices)
        assert rows.shape == (len(batch), D)
        assert torch.equal(rows, memory.rows(indices))
        assert np.array_equal(rows.numpy(), values[indices])


def test_a_batch_is_not_a_view_of_the_buffer(path, values):
    inputs = lazy_inputs(path)
    first = inputs.rows(np.arange(4))
    inputs.rows(np.arange(N))
    assert np.array_equal(first.numpy(), values[:4])


def test_blocks_in_memory_are_not_read_again(path):
    inputs = lazy_inputs(path)
    reads = counted(inputs)
    inputs.rows(np.arange(SLOTS * BLOCK))
    inputs.rows(np.arange(SLOTS * BLOCK)[::-1].copy())
    assert reads == Counter(range(SLOTS))
    inputs.rows(np.array([BLOCK * 10]))  # takes the place of one that was not used for longest
    inputs.rows(np.array([BLOCK * 10]))
    assert reads[10] == 1


@pytest.mark.parametrize("in_memory", ["always", "never"])
def test_row_selection(good, in_memory):
    data = open_dataset(DataConfig(path=str(good), in_memory=in_memory))
    assert len(data) == len(data.inputs) == 8
    assert data.rows("train").tolist() == [0, 1, 2, 3]
    assert data.rows("test", "val").tolist() == [4, 5, 6, 7]
    assert data.rows("train").dtype == np.int64
    assert data.rows().tolist() == []


# --------------------------------------------------------------------------------- order of epochs


def test_order_in_memory_is_a_full_shuffle(values):
    memory = MemoryInputs(torch.from_numpy(values))
    rows = np.arange(0, N, 2)
    order = np.concatenate(memory.epoch_windows(rows, seeded(1)))
    assert order.tolist() == rows[torch.randperm(len(rows), generator=seeded(1)).numpy()].tolist()
    generator = seeded(1)
    assert np.concatenate(memory.epoch_windows(rows, generator)).tolist() == order.tolist()
    assert np.concatenate(memory.epoch_windows(rows, generator)).tolist() != order.tolist()


@pytest.mark.parametrize("rows", [np.arange(SLOTS * BLOCK), np.arange(0, N, 30)])
def test_order_of_what_fits_in_the_buffer_is_that_in_memory(path, values, rows):
    inputs, memory = lazy_inputs(path), MemoryInputs(torch.from_numpy(values))
    ours, theirs = seeded(), seeded()
    for _ in range(2):  # the generators stay in step
        assert (
            np.concatenate(inputs.epoch_windows(rows, ours)).tolist()
            == np.concatenate(memory.epoch_windows(rows, theirs)).tolist()
        )


@pytest.mark.parametrize("batch_size", [7, 20])
@pytest.mark.parametrize("rows", [np.arange(N), np.arange(0, N, 3), np.arange(5, N, 5)])
def test_lazy_order_is_a_permutation_that_reads_each_block_once(path, values, rows, batch_size):
    inputs = lazy_inputs(path)
    order = np.concatenate(inputs.epoch_windows(rows, seeded(3)))
    assert sorted(order.tolist()) == rows.tolist()
    assert order.tolist() != np.concatenate(inputs.epoch_windows(rows, seeded(4))).tolist()
    assert order.tolist() == np.concatenate(inputs.epoch_windows(rows, seeded(3))).tolist()
    reads = counted(inputs)
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        assert np.array_equal(inputs.rows(batch).numpy(), values[batch])
    assert reads == Counter(set((rows // BLOCK).tolist()))


def test_lazy_order_shuffles_blocks_and_the_rows_of_a_bufferful(path):
    blocks = np.concatenate(lazy_inputs(path).epoch_windows(np.arange(N), seeded(0))) // BLOCK
    first = blocks[: SLOTS * BLOCK - 1]  # one less, for the last block is a row shorter
    assert len(set(first.tolist())) == SLOTS
    assert max(first) - min(first) > SLOTS  # from all over the file
    assert len(set(first[: 2 * SLOTS].tolist())) == SLOTS  # and all of them mixed


def test_an_empty_epoch(path):
    assert np.concatenate(lazy_inputs(path).epoch_windows(np.arange(0), seeded())).tolist() == []


# ------------------------------------------------------------------------------- processes, files


def read_rows_in_child(inputs, indices, queue) -> None:
    queue.put((inputs.rows(indices).numpy(), inputs._pid))


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_each_process_opens_the_file_for_itself(path, values):
    inputs = lazy_inputs(path)
    inputs.rows(np.arange(3))
    handle = inputs._stored
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    indices = np.array([90, 12, 50])
    child = context.Process(target=read_rows_in_child, args=(inputs, indices, queue))
    child.start()
    rows, pid = queue.get(timeout=60)
    child.join()
    assert np.array_equal(rows, values[indices])
    assert pid == child.pid
    assert inputs._stored is handle  # the parent's goes on
    assert np.array_equal(inputs.rows(np.array([77])).numpy(), values[[77]])


def test_a_child_does_not_use_its_parents_handle(path):
    """The pid alone decides: after it changes, the old handle is closed and the file opened anew."""
    inputs = lazy_inputs(path)
    inputs.rows(np.arange(3))
    old = inputs._stored
    inputs._pid -= 1
    inputs.rows(np.array([50]))
    assert inputs._stored is not old
    assert not old  # closed


def test_lazy_inputs_pickle_without_their_handle(path, values):
    inputs = lazy_inputs(path)
    inputs.rows(np.arange(3))
    copy = pickle.loads(pickle.dumps(inputs))
    assert copy._stored is None
    assert np.array_equal(copy.rows(np.array([5, 1])).numpy(), values[[5, 1]])


def test_file_locks_are_left_alone(good):
    with open(good) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # what HDF5 itself would wait for, and what fails on NFS
        with pytest.raises(OSError, match="lock"):
            h5py.File(good, "r", locking=True)
        assert len(read_contents(good).labels) == 8


def test_large_inputs_are_checked_when_they_are_read(good, monkeypatch):
    with h5py.File(good, "r+") as file:
        file["inputs"][6, 1] = np.nan
    monkeypatch.setattr(dataset, "SCAN_BYTES", 10)
    data = open_dataset(DataConfig(path=str(good), in_memory="never"))
    with pytest.raises(InputError, match="inputs: row 6, column 1 is nan"):
        data.inputs.rows(np.array([0]))  # in the same block


def test_a_file_that_goes_away(path, tmp_path):
    file = tmp_path / "b.h5"
    file.write_bytes(path.read_bytes())
    inputs = lazy_inputs(file)
    file.unlink()
    with pytest.raises(InputError, match="there is no such file"):
        inputs.rows(np.arange(3))


# ---------------------------------------------------------------------------------------- opening


@pytest.mark.parametrize(
    ("available", "kind"), [(8 * 3 * 4 * 4 + 1, MemoryInputs), (8 * 3 * 4 * 4, Hdf5Inputs)]
)
def test_auto_is_in_memory_below_a_quarter_of_what_is_free(good, monkeypatch, available, kind):
    monkeypatch.setattr(dataset, "available_memory", lambda: available)
    assert type(open_dataset(DataConfig(path=str(good))).inputs) is kind
    assert type(open_dataset(DataConfig(path=str(good), in_memory="always")).inputs) is MemoryInputs
    assert type(open_dataset(DataConfig(path=str(good), in_memory="never")).inputs) is Hdf5Inputs


def test_available_memory_is_that_of_this_machine():
    assert 2**20 < dataset.available_memory() < 2**50


def test_relative_paths_start_at_the_base(good, monkeypatch):
    config = DataConfig(path="good.h5")
    assert len(open_dataset(config, good.parent)) == 8
    assert open_dataset(config, good.parent).source == str(good)
    assert len(open_dataset(DataConfig(path=str(good)), Path("/elsewhere"))) == 8
    monkeypatch.chdir(good.parent)
    assert len(open_dataset(config)) == 8


def test_home_is_expanded(good, monkeypatch):
    monkeypatch.setenv("HOME", str(good.parent))
    assert len(open_dataset(DataConfig(path="~/good.h5"), Path("/elsewhere"))) == 8


def test_zero_training_rows(good):
    with h5py.File(good, "r+") as file:
        file["split"][:4] = 2
    with pytest.raises(InputError) as error:
        open_dataset(DataConfig(path=str(good)))
    assert str(error.value) == (
        f"{good}: split: no row is in the train split (train 0, val 2, test 6)\n  allowed: at least one row"
    )
    assert len(open_dataset(DataConfig(path=str(good)), require=()).rows("train")) == 0


def test_zero_validation_rows_matter_where_asked(good):
    with h5py.File(good, "r+") as file:
        file["split"][...] = [0, 0, 0, 0, 0, 0, 2, 2]
    data = open_dataset(DataConfig(path=str(good)))
    data.require_rows("train", "test")
    with pytest.raises(InputError, match=r"no row is in the val split \(train 6, val 0, test 2\)"):
        data.require_rows("train", "val")
    with pytest.raises(InputError, match="no row is in the val split"):
        open_dataset(DataConfig(path=str(good)), require=("train", "val"))


# ------------------------------------------------------------------------------------ fingerprint


def test_fingerprint_is_of_the_content_alone(good, tmp_path):
    always = open_dataset(DataConfig(path=str(good), in_memory="always"))
    never = open_dataset(DataConfig(path=str(good), in_memory="never"))
    elsewhere = tmp_path / "other.h5"
    elsewhere.write_bytes(good.read_bytes())
    other = open_dataset(DataConfig(path=str(elsewhere)))
    assert len(always.fingerprint) == 64
    assert always.fingerprint == never.fingerprint == other.fingerprint


def test_fingerprint_tells_every_part(good):
    data = open_dataset(DataConfig(path=str(good)))
    labels, split, ids = data.labels.copy(), data.split.copy(), data.ids.copy()
    labels[0, 1], split[0], ids[0] = -1, 1, "another"
    inputs = data.inputs.tensor.clone()
    inputs[7, 2] += 1
    names = (("A", "C"), data.taxonomy.names[1])
    changed = [
        {"labels": labels},
        {"split": split},
        {"ids": ids},
        {"inputs": MemoryInputs(inputs)},
        {"taxonomy": Taxonomy.from_parents(data.levels, data.taxonomy.parents, names, data.taxonomy.anchors)},
    ]
    prints = [dataclasses.replace(data, **change).fingerprint for change in changed]
    assert len({data.fingerprint, *prints}) == 6
    assert dataclasses.replace(data, source="elsewhere").fingerprint == data.fingerprint


def test_fingerprint_of_large_inputs_takes_evenly_spaced_rows(path, values, monkeypatch):
    monkeypatch.setattr(dataset, "SCAN_BYTES", values.nbytes // 3)
    monkeypatch.setattr(dataset, "BLOCK_BYTES", 2 * D * 4)  # 2 rows, then 6 left out
    data = open_dataset(DataConfig(path=str(path), in_memory="always"))

    def changed_at(row: int) -> bool:
        inputs = torch.from_numpy(values.copy())
        inputs[row] = 0
        return dataclasses.replace(data, inputs=MemoryInputs(inputs)).fingerprint != data.fingerprint

    assert [changed_at(row) for row in range(9)] == [True] * 2 + [False] * 6 + [True]


def test_the_taxonomy_alone(good, taxonomy):
    assert read_taxonomy(DataConfig(path=str(good))) == taxonomy
    assert read_taxonomy(DataConfig(path=good.name), good.parent) == taxonomy
    with pytest.raises(InputError, match="there is no such file"):
        read_taxonomy(DataConfig(path="none.h5"))
