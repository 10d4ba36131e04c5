"""What is in a data set, as numbers and as tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table

from hiertune._text import visible
from hiertune.config import DataConfig
from hiertune.data.dataset import HierarchicalDataset, num_bytes, open_dataset
from hiertune.data.splits import SPLITS


@dataclass(frozen=True)
class LevelDescription:
    name: str
    classes: int
    known: float
    """Share of all rows with a label at this level."""
    density: float
    """Share of the training rows with a label at this level; 0 without training rows."""
    trained: int
    """Classes with at least one training row."""
    singletons: int
    """Classes with exactly one row in all."""
    orphans: int
    """Classes whose parent is unknown; none at the top."""
    seen: dict[str, int]
    """Rows of val and of test whose class at this level has a training row."""


@dataclass(frozen=True)
class Description:
    source: str
    rows: dict[str, int]
    """Rows per split."""
    input_shape: tuple[int, ...]
    """Of one row."""
    input_type: str
    input_bytes: int
    """Size of all inputs in memory."""
    levels: tuple[LevelDescription, ...]
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return dataclasses.asdict(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        finest = self.levels[-1]
        total = sum(self.rows.values())
        yield f"[bold]{escape(visible(self.source))}[/bold]"
        yield f"{total:,} rows: " + ", ".join(f"{split} {n:,}" for split, n in self.rows.items())
        shape = " x ".join(map(str, self.input_shape))
        yield f"inputs: {shape} {self.input_type}, {self.input_bytes / 2**20:,.1f} MiB in memory"
        yield self._table()
        for split, seen in finest.seen.items():
            yield f"{split}: {seen:,} of {self.rows[split]:,} rows have a {finest.name} with training rows"
        yield f"fingerprint: {self.fingerprint}"

    def _table(self) -> Table:
        table = Table("level", box=None)
        for heading in ("classes", "known", "known (train)", "in training", "singletons", "orphans"):
            table.add_column(heading, justify="right")
        for level in self.levels:
            shares = (f"{share:.1%}" for share in (level.known, level.density))
            counts = (f"{n:,}" for n in (level.trained, level.singletons, level.orphans))
            table.add_row(level.name, f"{level.classes:,}", *shares, *counts)
        return table


def describe(source: str | Path | HierarchicalDataset) -> Description:
    """Describe a data set, or the file (or `builtin:NAME`) that holds one. InputError if it is bad.

    A file's inputs are read block by block, not into memory.
    """
    if not isinstance(source, HierarchicalDataset):
        source = open_dataset(DataConfig(path=str(source), in_memory="never"), require=())
    return Description(
        source=source.source,
        rows={split: len(source.rows(split)) for split in SPLITS},
        input_shape=source.inputs.shape[1:],
        input_type=str(source.inputs.dtype).removeprefix("torch."),
        input_bytes=num_bytes(source.inputs),
        levels=tuple(_levels(source)),
        fingerprint=source.fingerprint,
    )


def _levels(data: HierarchicalDataset) -> Iterator[LevelDescription]:
    for level, name in enumerate(data.levels):
        labels, size = data.labels[:, level], data.taxonomy.num_classes[level]
        counts = np.bincount(labels[labels >= 0], minlength=size)
        training = labels[data.rows("train")]
        known = training[training >= 0]
        trained = np.bincount(known, minlength=size) > 0
        held_out = {split: labels[data.rows(split)] for split in SPLITS[1:]}
        yield LevelDescription(
            name=name,
            classes=size,
            known=float((labels >= 0).mean()),
            density=len(known) / max(len(training), 1),
            trained=int(trained.sum()),
            singletons=int((counts == 1).sum()),
            orphans=int((data.taxonomy.parents[level] < 0).sum()) if level else 0,
            seen={split: int(trained[label[label >= 0]].sum()) for split, label in held_out.items()},
        )
