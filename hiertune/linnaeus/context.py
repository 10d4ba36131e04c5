"""What every section of the config depends on: levels, data, length of the training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hiertune.config import DataConfig
from hiertune.errors import InputError
from hiertune.linnaeus.settings import Settings, text_of

TOTAL_STEPS = "LR_SCHEDULER.TOTAL_STEPS"


@dataclass(frozen=True)
class DataFacts:
    """What is known of the data set that the config will train on."""

    path: str
    levels: tuple[str, ...]
    """Coarse to fine."""
    images: bool
    train_rows: int


def look_at(path: str) -> DataFacts:
    """What is known of a data set in hiertune's format, or `builtin:NAME`. Raises InputError."""
    from hiertune.data import open_dataset  # loads torch

    data = open_dataset(DataConfig(path=path))
    place = path if path.startswith("builtin:") else str(Path(path).expanduser().resolve())
    return DataFacts(place, data.levels, len(data.inputs.shape) == 4, len(data.rows("train")))


@dataclass
class Context:
    settings: Settings
    tasks: tuple[str, ...]
    """Linnaeus' names, fine to coarse."""
    levels: dict[str, str]
    """hiertune's name of each task."""
    facts: DataFacts | None
    epochs: int
    batch_size: int
    accumulation: int
    checks: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)

    @property
    def images(self) -> bool:
        return self.facts is None or self.facts.images

    def share_of(self, steps: float) -> float | None:
        """What share of the training so many optimiser steps are, at most 1; None if its length is not known.

        The data tell the length; without them the file's TOTAL_STEPS is taken, and that is to be checked.
        """
        if self.facts is not None:
            passes = -(-self.facts.train_rows // self.batch_size)
            return min(steps / (self.epochs * -(-passes // self.accumulation)), 1.0)
        total = self.settings.whole(TOTAL_STEPS, 0)
        if not total:
            return None
        check = (
            f"shares of the training: of {TOTAL_STEPS} ({total}), which Linnaeus itself replaces by what"
            " TRAIN.EPOCHS and the data make; --data says it"
        )
        if check not in self.checks:
            self.checks.append(check)
        return min(steps / total, 1.0)


def make_context(settings: Settings, names: Sequence[str] | None, facts: DataFacts | None) -> Context:
    key = "DATA.TASK_KEYS_H5"
    default = ["taxa_L10", "taxa_L20", "taxa_L30", "taxa_L40"]
    tasks = tuple(settings.sequence(key, default, text_of, "a list of names, fine to coarse"))
    ranks = [int(found[1]) for task in tasks if (found := re.search(r"_L(\d+)$", task))]
    if not tasks or len(set(tasks)) < len(tasks):
        raise settings.refuse(key, "must name each level once", "a list of names, fine to coarse")
    if len(ranks) == len(tasks) and ranks != sorted(ranks):
        raise settings.refuse(key, f"got [{', '.join(tasks)}]", "levels from fine to coarse: L10 before L20")
    levels = tuple(names) if names is not None else tasks[::-1]
    if len(levels) != len(tasks) or len(set(levels)) < len(levels):
        allowed = f"{len(tasks)} different names, coarse to fine, for {', '.join(tasks[::-1])}"
        raise InputError(f"got {', '.join(levels)}", key="--names", allowed=allowed)
    if facts is not None and facts.levels != levels:
        problem = f"has the levels {', '.join(facts.levels)}, but the experiment has {', '.join(levels)}"
        hint = f"--names {','.join(facts.levels)}" if len(facts.levels) == len(tasks) else None
        raise InputError(problem, file=facts.path, key="taxonomy/levels", allowed=hint)
    epochs, batch, accumulation = (
        settings.whole("TRAIN.EPOCHS", 300),
        settings.whole("DATA.BATCH_SIZE", 64),
        max(settings.whole("TRAIN.ACCUMULATION_STEPS", 0), 1),
    )
    for key, value in {"TRAIN.EPOCHS": epochs, "DATA.BATCH_SIZE": batch}.items():
        if value < 1:
            raise settings.refuse(key, f"{value} is out of range", "a whole number of at least 1")
    total = settings.whole(TOTAL_STEPS, 0)
    if total < 0:
        allowed = "a whole number of at least 1, or 0 for none"
        raise settings.refuse(TOTAL_STEPS, f"{total} is out of range", allowed)
    return Context(
        settings, tasks, dict(zip(tasks, levels[::-1], strict=True)), facts, epochs, batch, accumulation
    )
