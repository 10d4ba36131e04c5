"""What a trial tells its caller, and what the caller answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np


@dataclass(frozen=True)
class EpochResult:
    """One epoch, the same on every rank."""

    epoch: int
    """From 1; the first report of a resumed trial is the epoch after its checkpoint."""
    metrics: dict[str, float]
    """Finite, named as in `<split>/<metric>[/<level>]`."""
    seconds: float
    """Wall time of this epoch, validation included, averaged over the workers."""
    steps: int
    """Optimiser steps since the trial began."""
    last: bool
    """No further epoch will follow unless the caller asks for another trial."""
    input_seconds: float = 0.0
    """The part of `seconds` in which the next batch was waited for, averaged alike."""
    notes: tuple[str, ...] = ()
    """Things worth a line in the log, said with the first epoch of a run only."""


class Decision(Enum):
    """The caller's answer to a report; every rank must get the same."""

    CONTINUE = "continue"
    STOP = "stop"


class TrialFailed(Exception):
    """The trial cannot go on, by its own doing (a loss that is not finite).

    Raised on all ranks together, between collectives: the process group stays usable.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class TrialOutcome:
    """How a trial ended."""

    epochs: int
    """Epochs trained, those before a resume included."""
    stopped: bool
    """The caller answered STOP before the last epoch."""
    metrics: dict[str, float]
    """The last epoch's, and `test/...` if a test split was asked for."""
    predictions: tuple[np.ndarray, ...] = field(default=(), compare=False)
    """Labels of the test rows by each decoding rule that was asked for, int64 [N, L]."""
