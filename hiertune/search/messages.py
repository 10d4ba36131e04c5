"""What passes between the driver, the trial actors and the workers. Plain values; loads without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hiertune.config import TrialConfig
from hiertune.train.result import EpochResult, TrialOutcome


@dataclass(frozen=True)
class Job:
    """One training run for a worker group: a trial of the search, the refit, or a control."""

    id: str
    config: TrialConfig
    folder: str
    """Where its checkpoint (and, with `export`, its model) is written."""
    fit_on: tuple[str, ...] = ("train",)
    validate_on: tuple[str, ...] = ("val",)
    test_on: tuple[str, ...] = ()
    rules: tuple[dict[str, Any], ...] = ()
    """Decoding rules (plain, so that this loads without torch) by which the test rows are named."""
    export: bool = False
    keep_logits: str | None = None
    """File for the base logits of the validation split, written at the last epoch."""
    max_failures: int = 3
    """How often it may lose its workers before it counts as failed."""


@dataclass(frozen=True)
class WorkerSetup:
    """What the workers of a group are told at their start."""

    group: str
    broker: Any
    """Handle of the broker actor."""


@dataclass(frozen=True)
class Reported:
    """An epoch is done; the workers wait for a decision, unless it was the last one."""

    result: EpochResult


@dataclass(frozen=True)
class Finished:
    """The job ended by itself: all its epochs are done."""

    outcome: TrialOutcome


@dataclass(frozen=True)
class Failed:
    """The job ended without a usable result."""

    reason: str


Event = Reported | Finished | Failed
