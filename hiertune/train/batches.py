"""Which rows each optimiser step sees: decided by seed and epoch alone, never by the workers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hiertune.data import Inputs
from hiertune.train.workers import Workers


@dataclass(frozen=True)
class Step:
    """One optimiser step: the rows of each of its forward passes, of all workers together."""

    passes: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class BatchPlan:
    """Cuts every epoch's own order of the rows into passes and steps.

    Every row comes once per epoch, a smaller last batch included; only a last batch of a single row
    joins the one before it, because batch statistics need two. All workers make the same number of
    passes: where a batch has fewer rows than there are workers, some get none.
    """

    inputs: Inputs
    rows: np.ndarray
    """Sorted int64 [N]: the rows to train on."""
    batch_size: int
    """Rows of one pass over all workers."""
    seed: int
    workers: Workers
    accumulation: int = 1
    """Passes per step."""

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._starts()) // self.accumulation)

    @property
    def smallest_pass(self) -> int:
        """Rows of the smallest pass over all workers."""
        return int(np.diff(self._starts(), append=len(self.rows)).min())

    def epoch(self, epoch: int) -> list[Step]:
        """The steps of one epoch."""
        generator = torch.Generator().manual_seed(random_stream(self.seed, epoch, 0))
        passes = np.split(self.inputs.epoch_order(self.rows, generator), self._starts()[1:])
        groups = range(0, len(passes), self.accumulation)
        return [Step(tuple(passes[first : first + self.accumulation])) for first in groups]

    def shard(self, rows: np.ndarray) -> np.ndarray:
        """This worker's part of `rows`: consecutive, disjoint, sizes differ by one at most."""
        rank, size = self.workers.rank, self.workers.size
        return rows[len(rows) * rank // size : len(rows) * (rank + 1) // size]

    def _starts(self) -> np.ndarray:
        starts = np.arange(0, len(self.rows), self.batch_size)
        lonely_row = self.batch_size > 1 and len(starts) > 1 and len(self.rows) - starts[-1] == 1
        return starts[:-1] if lonely_row else starts


def random_stream(seed: int, epoch: int, *number: int) -> int:
    """A seed for one use of randomness in one epoch, unrelated to those of other uses and epochs.

    The last number is not 0 where there are several: a sequence and its continuation by 0 are the same.
    """
    return int(np.random.SeedSequence((seed, epoch, *number)).generate_state(1, np.uint32)[0])
