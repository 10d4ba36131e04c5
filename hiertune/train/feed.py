"""From rows of the data set to batches on the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from hiertune.data import Inputs, MemoryInputs
from hiertune.data.dataset import num_bytes
from hiertune.train.augment import Augment

Batch = tuple[Tensor, Tensor]
"""Inputs [B, ...] and labels [B, L]."""


class Feed:
    """Batches of a data set. Labels live on the device; inputs too, on a GPU that has twice the room.

    Else, but for inputs that lie in the CPU's memory and are used there as they are, a thread reads (and
    augments) the next batch while this one is used; a GPU gets it through pinned memory.
    """

    def __init__(
        self,
        inputs: Inputs,
        labels: np.ndarray,
        device: torch.device,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """`labels` int64 [N, L]; `beat` is called for every batch."""
        self._inputs = inputs
        self._beat = beat
        self._device = device
        self._labels = torch.tensor(labels, device=device)
        self._resident: Tensor | None = None
        if device.type == "cuda" and num_bytes(inputs) < torch.cuda.mem_get_info(device)[0] / 2:
            self._resident = inputs.rows(np.arange(len(inputs))).to(device)
        self._at_hand = device.type == "cpu" and isinstance(inputs, MemoryInputs)
        self.seconds_waited = 0.0
        """Wall time in which batches were waited for, in all."""

    def batches(self, shards: Iterable[np.ndarray], augment: Augment | None = None) -> Iterator[Batch]:
        """One batch per array of rows (int64 [B], possibly empty)."""
        if augment is None and (self._at_hand or self._resident is not None):
            return self._timed(map(self._batch, shards))
        return self._timed(self._prefetched(shards, augment))

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.seconds_waited += time.perf_counter() - start
            if batch is None:
                return
            self._beat()
            yield batch

    def _batch(self, rows: np.ndarray) -> Batch:
        index = torch.from_numpy(rows).to(self._device)
        if self._resident is None:
            return self._inputs.rows(rows), self._labels.index_select(0, index)
        return self._resident.index_select(0, index), self._labels.index_select(0, index)

    def _prefetched(self, shards: Iterable[np.ndarray], augment: Augment | None = None) -> Iterator[Batch]:
        with ThreadPoolExecutor(1, "hiertune-reader") as reader:
            coming = None
            for rows in shards:
                ready, coming = coming, (rows, reader.submit(self._read, rows, augment))
                if ready is not None:
                    yield self._sent(ready[0], ready[1].result())
            if coming is not None:
                yield self._sent(coming[0], coming[1].result())

    def _read(self, rows: np.ndarray, augment: Augment | None) -> Tensor:
        inputs = self._inputs.rows(rows)
        if augment is not None:
            inputs = augment(inputs, rows)
        return inputs.pin_memory() if self._device.type == "cuda" else inputs

    def _sent(self, rows: np.ndarray, inputs: Tensor) -> Batch:
        index = torch.from_numpy(rows).to(self._device)
        return inputs.to(self._device, non_blocking=True), self._labels.index_select(0, index)
