"""What passes between the driver, the trial actors and the workers. Plain values; loads without torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hiertune.config import TrialConfig
from hiertune.train.result import EpochResult, TrialOutcome


@dataclass(frozen=True)
class Job:
    """One training run for a worker group: a trial of the search, the refit, or a control."""

    id: str
    config: TrialConfig = field(repr=False)  # Tune writes jobs into messages that nobody reads
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
    max_retries: int = 3
    """How often it goes on after a fault that another try can mend, before it counts as failed."""
    hang_timeout: float = 1800.0
    """Seconds without a trained batch after which its workers are replaced."""
    until: int | None = None
    """It ends after so many epochs, with a checkpoint from which another job goes on. None: with its last."""

    def up_to(self, epoch: int | None) -> Job:
        """The part of it that ends after that epoch, or all. Each part has a name of its own."""
        return self if epoch is None else replace(self, id=f"{self.id}-to-{epoch}", until=epoch)


@dataclass(frozen=True)
class Measured:
    """An epoch's metrics on their way through Tune, which keeps statistics of every number it can see in a
    result: 44 of them cost 130 KiB per trial and half of the driver's time."""

    metrics: dict[str, float] = field(repr=False)


@dataclass(frozen=True)
class WorkerSetup:
    """What the workers of a group are told at their start."""

    group: str
    broker: Any
    """Handle of the broker actor."""


Fault = Literal["diverged", "error", "out_of_memory", "crashed", "lost", "hang", "not_started"]
"""What went wrong: a loss that is not finite; an exception; no memory, on the device or the node; a worker
process that crashed or was killed; a node that is gone; no progress; workers that can't be started."""

MENDABLE: frozenset[Fault] = frozenset({"out_of_memory", "crashed", "lost", "hang"})
"""Faults after which another try may go well: the job goes on from its checkpoint in new processes."""


@dataclass(frozen=True)
class Cause:
    """Why a job could not go on, in words for its user."""

    fault: Fault
    reason: str


@dataclass(frozen=True)
class Incident:
    """A fault after which the job went on from its checkpoint."""

    fault: Fault
    reason: str
    epoch: int
    """The last epoch that was reported before it."""
    time: float
    """Seconds since 1970."""


@dataclass(frozen=True)
class Reported:
    """An epoch is done; the workers wait for a decision, unless it was the last one."""

    result: EpochResult
    incidents: tuple[Incident, ...] = ()
    """What the job survived since its event before this one."""


@dataclass(frozen=True)
class Finished:
    """The job ended by itself: all its epochs are done."""

    outcome: TrialOutcome
    incidents: tuple[Incident, ...] = ()


@dataclass(frozen=True)
class Failed:
    """The job ended without a usable result."""

    reason: str
    fault: Fault = "error"
    incidents: tuple[Incident, ...] = ()


@dataclass(frozen=True)
class Stopped:
    """The search is stopping, and no worker group had taken the job up, or the one that had was lost."""

    incidents: tuple[Incident, ...] = ()


Event = Reported | Finished | Failed | Stopped
