"""Which rows each optimiser step sees, and how: decided by seed and epoch alone, never by the workers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from hiertune.data import Inputs
from hiertune.train.mixing import Mix, Mixing
from hiertune.train.unknown import UnknownLabels
from hiertune.train.workers import Workers


@dataclass(frozen=True)
class Pass:
    """One forward pass of all workers together, or one worker's part of it."""

    rows: np.ndarray
    """int64 [B]"""
    mix: Mix | None = None
    """Rows that are mixed with others."""
    hidden: np.ndarray | None = None
    """bool [B + M, L]: labels of `reads` that count for nothing, though they are given."""

    @property
    def reads(self) -> np.ndarray:
        """int64 [B + M]: all rows that must be read; the M partners of mixed rows come last."""
        return self.rows if self.mix is None else np.concatenate([self.rows, self.mix.partners])

    def shard(self, workers: Workers) -> Pass:
        """This worker's part: consecutive, disjoint, sizes differ by one at most."""
        part = slice(*(len(self.rows) * rank // workers.size for rank in (workers.rank, workers.rank + 1)))
        if self.mix is None:
            return Pass(self.rows[part], None, None if self.hidden is None else self.hidden[part])
        mix, kept = self.mix.part(part)
        hidden = None
        if self.hidden is not None:
            size = len(self.rows)
            hidden = np.concatenate([self.hidden[:size][part], self.hidden[size:][kept]])
        return Pass(self.rows[part], mix, hidden)

    def known(self, labels: np.ndarray) -> np.ndarray:
        """How many rows count at each level, float64 [L]; of a mixed row each label counts by its share.

        `labels` int [N, L] are those of the whole data set, -1 unknown.
        """
        known = labels[self.reads] >= 0
        if self.hidden is not None:
            known &= ~self.hidden
        counts = known[: len(self.rows)].sum(0, dtype=np.float64)
        if self.mix is not None:
            first = self.mix.first_uncertain
            own, partners = known[self.mix.positions, first:], known[len(self.rows) :, first:]
            counts[first:] += (1.0 - self.mix.share) * (partners.sum(0) - own.sum(0, dtype=np.float64))
        return counts


@dataclass(frozen=True)
class Step:
    """One optimiser step: its forward passes."""

    passes: tuple[Pass, ...]

    def known(self, labels: np.ndarray) -> np.ndarray:
        """See `Pass.known`; of all passes together."""
        return np.sum([each.known(labels) for each in self.passes], axis=0)


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
    accumulation: int = 1
    """Passes per step."""
    epochs: int = 1
    """Of the whole training: what changes in its course goes by the share of its steps that is done."""
    mixing: Mixing | None = None
    unknown: UnknownLabels | None = None
    """Which of the labels that say "unknown" count; without it, all that are given."""

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._starts()) // self.accumulation)

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def smallest_pass(self) -> int:
        """Rows of the smallest pass over all workers."""
        return int(np.diff(self._starts(), append=len(self.rows)).min())

    def epoch(self, epoch: int) -> list[Step]:
        """The steps of one epoch, which is counted from 1."""
        generator = torch.Generator().manual_seed(random_stream(self.seed, epoch, ORDER))
        windows = self.inputs.epoch_windows(self.rows, generator)
        order = np.concatenate(windows)
        mix_of = hidden_of = None
        if self.mixing is not None:
            mix_of = self.mixing.epoch(windows, np.random.default_rng((self.seed, epoch, MIXING)))
        if self.unknown is not None:
            hidden_of = self.unknown.epoch(np.random.default_rng((self.seed, epoch, UNKNOWN)))
        passes: list[Pass] = []
        for number, places in enumerate(np.split(np.arange(len(order)), self._starts()[1:])):
            progress = self.progress((epoch - 1) * self.steps_per_epoch + number // self.accumulation)
            whole = Pass(order[places], mix_of(places, progress) if mix_of else None)
            if hidden_of is not None:
                whole = replace(whole, hidden=hidden_of(whole.reads, progress))
            passes.append(whole)
        groups = range(0, len(passes), self.accumulation)
        return [Step(tuple(passes[first : first + self.accumulation])) for first in groups]

    def progress(self, step: int) -> float:
        """Share of the training's other steps that are done before `step` (from 0): 1 in the last one."""
        return step / (self.total_steps - 1) if self.total_steps > 1 else 1.0

    def _starts(self) -> np.ndarray:
        starts = np.arange(0, len(self.rows), self.batch_size)
        lonely_row = self.batch_size > 1 and len(starts) > 1 and len(self.rows) - starts[-1] == 1
        return starts[:-1] if lonely_row else starts


ORDER, FIRST_WORKER, MIXING, UNKNOWN = 0, 1, 2**31, 2**31 + 1
"""Numbers of the uses of randomness in one epoch (see `random_stream`); each worker's is its rank after the
first worker's."""


def random_stream(seed: int, epoch: int, *number: int) -> int:
    """A seed for one use of randomness in one epoch, unrelated to those of other uses and epochs.

    The last number is not 0 where there are several: a sequence and its continuation by 0 are the same.
    """
    return int(np.random.SeedSequence((seed, epoch, *number)).generate_state(1, np.uint32)[0])
