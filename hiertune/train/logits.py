"""The base logits of a whole split, though each worker computes those of its own rows.

Shapes: N rows of the split, B rows of a batch, C_l classes of level l.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hiertune.taxonomy import Taxonomy
from hiertune.train.workers import Workers


class LogitCollector:
    """Takes one batch after another; `shard` are this worker's places among the N rows, in order."""

    def __init__(self, taxonomy: Taxonomy, rows: int, shard: np.ndarray, device: torch.device) -> None:
        self._base = {
            level: torch.zeros(rows, size, device=device)
            for level, size in zip(taxonomy.levels, taxonomy.num_classes, strict=True)
        }
        self._next = int(shard[0]) if len(shard) else 0

    def add(self, base: Mapping[str, Tensor]) -> None:
        """Base logits `[B, C_l]` of the next rows; float32 is kept, whatever autocast gave."""
        first = self._next
        for level, logits in base.items():
            self._next = first + len(logits)
            self._base[level][first : self._next] = logits

    def gather(self, workers: Workers) -> dict[str, Tensor]:
        """float32 `[N, C_l]` per level, on every worker: where one has a row the others have zeros."""
        return {level: workers.sum(logits) for level, logits in self._base.items()}
