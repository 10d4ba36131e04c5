"""What a model says of a whole split, though each worker has logits of its own rows only.

Shapes: N rows of the split, B rows of a batch, L levels, C_l classes of level l.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hiertune.decoding import Decoder
from hiertune.taxonomy import Taxonomy
from hiertune.train.workers import Workers


class Collector(Protocol):
    """Takes one batch of this worker's rows after another."""

    def add(self, base: Mapping[str, Tensor], refined: Mapping[str, Tensor]) -> None:
        """Base and refined logits `[B, C_l]` of the next rows."""
        ...


class LabelCollector:
    """The labels that decoding rules give; `shard` are this worker's places among the N rows, in order."""

    def __init__(self, decoders: Sequence[Decoder], levels: int, rows: int, shard: np.ndarray) -> None:
        self._decoders = decoders
        self._labels = [torch.zeros(rows, levels, dtype=torch.int64) for _ in decoders]
        self._next = int(shard[0]) if len(shard) else 0

    def add(self, base: Mapping[str, Tensor], refined: Mapping[str, Tensor]) -> None:
        for decoder, labels in zip(self._decoders, self._labels, strict=True):
            named = decoder(base, refined)
            labels[self._next : self._next + len(named)] = named.cpu()
        self._next += len(next(iter(refined.values())))

    def gather(self, workers: Workers, device: torch.device) -> tuple[np.ndarray, ...]:
        """int64 `[N, L]` per rule, on every worker: where one has a row the others have zeros."""
        return tuple(workers.sum(labels.to(device)).cpu().numpy() for labels in self._labels)


class LogitCollector:
    """The base logits; `shard` are this worker's places among the N rows, in order."""

    def __init__(self, taxonomy: Taxonomy, rows: int, shard: np.ndarray, device: torch.device) -> None:
        self._base = {
            level: torch.zeros(rows, size, device=device)
            for level, size in zip(taxonomy.levels, taxonomy.num_classes, strict=True)
        }
        self._next = int(shard[0]) if len(shard) else 0

    def add(self, base: Mapping[str, Tensor], refined: Mapping[str, Tensor]) -> None:
        """float32 is kept, whatever autocast gave."""
        first = self._next
        for level, logits in base.items():
            self._next = first + len(logits)
            self._base[level][first : self._next] = logits

    def gather(self, workers: Workers) -> dict[str, Tensor]:
        """float32 `[N, C_l]` per level, on every worker: where one has a row the others have zeros."""
        return {level: workers.sum(logits) for level, logits in self._base.items()}
