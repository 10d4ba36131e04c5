"""From rows of the data set to batches on the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from hiertune.data import Inputs
from hiertune.data.dataset import num_bytes

Batch = tuple[Tensor, Tensor]
"""Inputs [B, ...] and labels [B, L]."""


class Feed:
    """Batches of a data set. Labels live on the device; inputs too, on a GPU that has twice the room.

    Else a GPU gets its inputs through pinned memory, the next batch read while this one is used.
    """

    def __init__(self, inputs: Inputs, labels: np.ndarray, device: torch.device) -> None:
        """`labels` int64 [N, L]"""
        self._inputs = inputs
        self._device = device
        self._labels = torch.tensor(labels, device=device)
        self._resident: Tensor | None = None
        if device.type == "cuda" and num_bytes(inputs) < torch.cuda.mem_get_info(device)[0] / 2:
            self._resident = inputs.rows(np.arange(len(inputs))).to(device)

    def batches(self, shards: Iterable[np.ndarray]) -> Iterator[Batch]:
        """One batch per array of rows (int64 [B], possibly empty)."""
        if self._device.type == "cuda" and self._resident is None:
            return self._prefetched(shards)
        return map(self._batch, shards)

    def _batch(self, rows: np.ndarray) -> Batch:
        index = torch.from_numpy(rows).to(self._device)
        if self._resident is None:
            return self._inputs.rows(rows), self._labels.index_select(0, index)
        return self._resident.index_select(0, index), self._labels.index_select(0, index)

    def _prefetched(self, shards: Iterable[np.ndarray]) -> Iterator[Batch]:
        with ThreadPoolExecutor(1) as reader:
            coming = None
            for rows in shards:
                ready, coming = coming, (rows, reader.submit(self._pinned, rows))
                if ready is not None:
                    yield self._sent(ready[0], ready[1].result())
            if coming is not None:
                yield self._sent(coming[0], coming[1].result())

    def _pinned(self, rows: np.ndarray) -> Tensor:
        return self._inputs.rows(rows).pin_memory()

    def _sent(self, rows: np.ndarray, inputs: Tensor) -> Batch:
        index = torch.from_numpy(rows).to(self._device)
        return inputs.to(self._device, non_blocking=True), self._labels.index_select(0, index)
