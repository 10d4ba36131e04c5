"""A data set as training sees it: inputs (in memory, or read block by block), labels, ids and split."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import weakref
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import h5py
import numpy as np
import torch

from hiertune.config import DataConfig, KmerConfig
from hiertune.data.builtin import builtin_path
from hiertune.data.format import BLOCK_BYTES, Contents, block_rows, open_hdf5, read_contents, read_rows
from hiertune.data.splits import SPLITS
from hiertune.errors import InputError
from hiertune.taxonomy import Taxonomy

BUFFER_BYTES = 2**26
"""Blocks that a file read lazily keeps in memory per process; also how far its rows are shuffled."""

SCAN_BYTES = 2**30
"""Larger inputs are not read through at opening: their blocks are checked as they are read, and
their fingerprint takes evenly spaced rows."""


class Inputs(Protocol):
    """Rows of inputs, float32 [N, D] or uint8 [N, H, W, C]."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __len__(self) -> int: ...

    def rows(self, indices: np.ndarray) -> torch.Tensor:
        """The rows at `indices` (int64 [n], any order, repeats allowed), as [n, D] or [n, H, W, C]."""
        ...

    def epoch_windows(self, rows: np.ndarray, generator: torch.Generator) -> list[np.ndarray]:
        """`rows` (sorted int64 [n]) in the random order of one epoch, in windows of what is read together.

        In memory it is a full shuffle, one window. Inputs read lazily shuffle their blocks, and then
        the rows within as many blocks as fit in BUFFER_BYTES (a window), so that each block is read
        once per epoch; when all of it fits, that is the same full shuffle.
        """
        ...


class MemoryInputs:
    """Inputs held as one tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def __len__(self) -> int:
        return len(self.tensor)

    def rows(self, indices: np.ndarray) -> torch.Tensor:
        return self.tensor.index_select(0, torch.from_numpy(indices))

    def epoch_windows(self, rows: np.ndarray, generator: torch.Generator) -> list[np.ndarray]:
        return [rows[_permutation(len(rows), generator)]]


class Hdf5Inputs:
    """Inputs read from a file in blocks of whole rows, the blocks used last kept in memory.

    Single rows of a chunked file are up to a hundred times slower to read than whole blocks. The
    file is opened by each process for itself: a handle from before a fork reads wrong rows.
    """

    def __init__(self, path: Path, contents: Contents) -> None:
        self.path = path
        self.shape = contents.input_shape
        self.numpy_type = contents.input_type
        self.dtype = torch.from_numpy(np.empty(0, self.numpy_type)).dtype
        self.block_rows = block_rows(self.shape, self.dtype.itemsize, contents.chunk_rows)
        self.buffer_blocks = max(2, BUFFER_BYTES // (self.block_rows * row_bytes(self)))
        self._buffer: _BlockBuffer | None = None
        self._stored: h5py.Dataset | None = None
        self._pid = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, indices: np.ndarray) -> torch.Tensor:
        with self._lock:  # a thread may still be reading ahead for a trial that failed
            return self._gather(indices)

    def _gather(self, indices: np.ndarray) -> torch.Tensor:
        if self._buffer is None:
            self._buffer = _BlockBuffer(self)
        numbers = self._buffer.held_first(np.unique(indices // self.block_rows))
        if len(numbers) <= self.buffer_blocks:
            return self._buffer.gather(indices, numbers)
        out = torch.empty((len(indices), *self.shape[1:]), dtype=self.dtype)
        for first in range(0, len(numbers), self.buffer_blocks):
            part = numbers[first : first + self.buffer_blocks]
            places = np.flatnonzero(np.isin(indices // self.block_rows, part))
            out[torch.from_numpy(places)] = self._buffer.gather(indices[places], part)
        return out

    def epoch_windows(self, rows: np.ndarray, generator: torch.Generator) -> list[np.ndarray]:
        _, block_of_row = np.unique(rows // self.block_rows, return_inverse=True)
        num_blocks = int(block_of_row.max(initial=-1)) + 1
        order = _permutation(len(rows), generator)
        if num_blocks <= self.buffer_blocks:
            return [rows[order]]
        window_of_block = _permutation(num_blocks, generator) // self.buffer_blocks
        window = window_of_block[block_of_row[order]]
        order = order[np.argsort(window, kind="stable")]
        return np.split(rows[order], np.cumsum(np.bincount(window))[:-1])

    def scan(self) -> None:
        """Read every block once, for its checks."""
        block = np.empty((self.block_rows, *self.shape[1:]), self.numpy_type)
        for number in range(math.ceil(len(self) / self.block_rows)):
            self.read_block(number, block)

    def read_block(self, number: int, out: np.ndarray) -> None:
        """Read a block into `out` `[block_rows, ...]`, and check it; the last one fills it in part."""
        if self._stored is None or self._pid != os.getpid():
            if self._stored is not None:
                self._stored.file.close()  # else HDF5 would go on using the parent's file descriptor
            self._stored, self._pid = open_hdf5(self.path)["inputs"], os.getpid()
        first = number * self.block_rows
        read_rows(self.path, self._stored, first, out[: len(self) - first])

    def read_all(self) -> MemoryInputs:
        """All rows, read and checked now."""
        values = np.empty(self.shape, self.numpy_type)
        for number in range(math.ceil(len(self) / self.block_rows)):
            self.read_block(number, values[number * self.block_rows :][: self.block_rows])
        return MemoryInputs(torch.from_numpy(values))

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"} | {
            "_stored": None,
            "_buffer": None,
        }

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state | {"_lock": threading.Lock()}


class _BlockBuffer:
    """The blocks used last, in one tensor: rows of many blocks are then one gather."""

    def __init__(self, inputs: Hdf5Inputs) -> None:
        self.inputs = weakref.proxy(inputs)  # no cycle: the file is closed as soon as nobody reads it
        num_blocks = math.ceil(len(inputs) / inputs.block_rows)
        slots = min(inputs.buffer_blocks, num_blocks)
        self.values = torch.empty((slots, inputs.block_rows, *inputs.shape[1:]), dtype=inputs.dtype)
        self.slot_of_block = np.full(num_blocks + 1, -1)  # the one more is what empty slots hold
        self.block_in_slot = np.full(slots, num_blocks)
        self.last_use = np.zeros(slots, np.int64)
        self.clock = 0

    def gather(self, indices: np.ndarray, numbers: np.ndarray) -> torch.Tensor:
        """Rows at `indices`, which lie in the blocks `numbers`: at most as many as there are slots."""
        self._hold(numbers)
        slots = self.slot_of_block[indices // self.inputs.block_rows]
        places = slots * self.inputs.block_rows + indices % self.inputs.block_rows
        return self.values.flatten(0, 1).index_select(0, torch.from_numpy(places))

    def held_first(self, numbers: np.ndarray) -> np.ndarray:
        """Blocks in an order in which none is replaced before it is used."""
        return numbers[np.argsort(self.slot_of_block[numbers] < 0, kind="stable")]

    def _hold(self, numbers: np.ndarray) -> None:
        self.clock += 2
        present = self.slot_of_block[numbers] >= 0
        self.last_use[self.slot_of_block[numbers[present]]] = self.clock
        if present.all():
            return
        missing = numbers[~present].tolist()
        for number, slot in zip(missing, np.argsort(self.last_use, kind="stable").tolist(), strict=False):
            self.slot_of_block[self.block_in_slot[slot]] = -1
            self.inputs.read_block(number, self.values[slot].numpy())
            self.slot_of_block[number], self.block_in_slot[slot] = slot, number
            self.last_use[slot] = self.clock + 1  # an epoch is through with those it found here sooner


def _permutation(n: int, generator: torch.Generator) -> np.ndarray:
    return torch.randperm(n, generator=generator).numpy()


@dataclass(frozen=True, eq=False)
class HierarchicalDataset:
    """Everything that a trial reads. Row `i` of each field is the same thing."""

    inputs: Inputs
    """float32 features [N, D] or uint8 images [N, H, W, C]."""
    labels: np.ndarray
    """int64 [N, L]: class at each level, coarse -> fine; -1 where unknown."""
    ids: np.ndarray
    """object [N] of str, all different."""
    split: np.ndarray
    """int8 [N]: 0 train, 1 val, 2 test."""
    taxonomy: Taxonomy
    source: str = "data"
    """Where it came from, for messages."""
    kmer: KmerConfig | None = None
    """How sequences became the inputs; None where they did not."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def levels(self) -> tuple[str, ...]:
        return self.taxonomy.levels

    def rows(self, *splits: str) -> np.ndarray:
        """Sorted int64 indices of all rows of the named splits (train, val, test)."""
        return np.flatnonzero(np.isin(self.split, [SPLITS.index(split) for split in splits]))

    def require_rows(self, *splits: str) -> None:
        """InputError naming the first of these splits that has no rows."""
        for split in splits:
            if not len(self.rows(split)):
                counts = ", ".join(f"{name} {len(self.rows(name))}" for name in SPLITS)
                raise InputError(
                    f"no row is in the {split} split ({counts})",
                    file=self.source,
                    key="split",
                    allowed="at least one row",
                )

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the content: labels, ids, split, taxonomy and inputs, wherever they are kept.

        Of inputs larger than SCAN_BYTES it takes evenly spaced rows, about that many bytes.
        """
        digest = hashlib.sha256()
        texts = [self.taxonomy.to_dict(), list(self.ids), list(self.inputs.shape), str(self.inputs.dtype)]
        digest.update(json.dumps(texts, sort_keys=True).encode())
        digest.update(self.labels.astype("<i8").tobytes())
        digest.update(self.split.tobytes())
        step = max(1, BLOCK_BYTES // row_bytes(self.inputs))
        stride = max(1, math.ceil(num_bytes(self.inputs) / SCAN_BYTES))
        for first in range(0, len(self), step * stride):
            digest.update(self.inputs.rows(np.arange(first, min(first + step, len(self)))).numpy().tobytes())
        return digest.hexdigest()


def row_bytes(inputs: Inputs) -> int:
    return math.prod(inputs.shape[1:]) * inputs.dtype.itemsize


def num_bytes(inputs: Inputs) -> int:
    """Size of all inputs, in memory."""
    return inputs.shape[0] * row_bytes(inputs)


def open_dataset(
    config: DataConfig, base_dir: Path | None = None, *, require: tuple[str, ...] = ("train",)
) -> HierarchicalDataset:
    """Open and check a data set.

    `base_dir` is where a relative path starts; `require` names splits that must have rows. Labels,
    ids, split and taxonomy are always checked; inputs up to SCAN_BYTES, or held in memory, are
    searched for NaN here, larger ones as they are read. Raises InputError.
    """
    path = resolve_path(config, base_dir)
    contents = read_contents(path)
    lazy = Hdf5Inputs(path, contents)
    free = available_memory()
    if row_bytes(lazy) > free:
        problem = f"one row takes {row_bytes(lazy) / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free"
        raise InputError(problem, file=path, key="inputs", allowed="rows that fit into memory")
    small = num_bytes(lazy) < free / 4
    inputs: Inputs = lazy
    if config.in_memory == "always" or (config.in_memory == "auto" and small):
        inputs = lazy.read_all()
    elif num_bytes(lazy) <= SCAN_BYTES:
        lazy.scan()
    source = config.path if config.path.startswith("builtin:") else str(path)
    data = HierarchicalDataset(
        inputs, contents.labels, contents.ids, contents.split, contents.taxonomy, source, contents.kmer
    )
    data.require_rows(*require)
    return data


def read_taxonomy(config: DataConfig, base_dir: Path | None = None) -> Taxonomy:
    """The taxonomy of a data set, whose inputs are not read. Raises InputError."""
    return read_contents(resolve_path(config, base_dir)).taxonomy


def resolve_path(config: DataConfig, base_dir: Path | None = None) -> Path:
    """The HDF5 file that a config means; a built-in set is made if it is not there yet."""
    if config.path.startswith("builtin:"):
        return builtin_path(config.path.removeprefix("builtin:"), config.kmer)
    return (base_dir or Path()) / Path(config.path).expanduser()


def available_memory() -> int:
    """Bytes that may be taken without harm: what the system can give, or its container allows."""
    meminfo, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if not meminfo.exists():  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    allowed = limit.read_text().strip() if limit.exists() else "max"
    return available if allowed == "max" else min(available, int(allowed))
