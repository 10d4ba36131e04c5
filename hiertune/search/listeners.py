"""What hears of trials as they happen: tracking, the curves file, and (in display.py) the terminal."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Protocol

from hiertune.config import TrialConfig
from hiertune.search.ledger import Mode, TrialRecord
from hiertune.space import flatten
from hiertune.tracking import Tracker

logger = logging.getLogger(__name__)


class Listener(Protocol):
    """Whoever wants to hear of trials. Called on Tune's loop: be quick."""

    def trial_started(self, number: int, config: TrialConfig, params: dict) -> None: ...

    def trial_reported(self, number: int, epoch: int, metrics: dict[str, float]) -> None: ...

    def trial_ended(self, record: TrialRecord) -> None: ...


class Listeners:
    """Several listeners as one."""

    def __init__(self, listeners: list[Listener]) -> None:
        self._listeners = listeners

    def trial_started(self, number: int, config: TrialConfig, params: dict) -> None:
        for listener in self._listeners:
            listener.trial_started(number, config, params)

    def trial_reported(self, number: int, epoch: int, metrics: dict[str, float]) -> None:
        for listener in self._listeners:
            listener.trial_reported(number, epoch, metrics)

    def trial_ended(self, record: TrialRecord) -> None:
        for listener in self._listeners:
            listener.trial_ended(record)


class TrackingListener:
    """Passes what happens to trials on to MLflow's spool."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def trial_started(self, number: int, config: TrialConfig, params: dict) -> None:
        self._tracker.trial_started(number, flatten(config))

    def trial_reported(self, number: int, epoch: int, metrics: dict[str, float]) -> None:
        self._tracker.log(number, epoch, metrics)

    def trial_ended(self, record: TrialRecord) -> None:
        self._tracker.end(record)


class Curves:
    """Listener: every epoch's metrics of every trial as rows of `curves.csv`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        if not path.exists():
            self._append([("trial", "epoch", "metric", "value")])

    def trial_started(self, number: int, config: TrialConfig, params: dict) -> None: ...

    def trial_reported(self, number: int, epoch: int, metrics: dict[str, float]) -> None:
        self._append([(number, epoch, name, value) for name, value in metrics.items()])

    def trial_ended(self, record: TrialRecord) -> None: ...

    def _append(self, rows: list[tuple]) -> None:
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)


class Log:
    """A line in the search's log for every trial that starts or ends."""

    def trial_started(self, number: int, config: TrialConfig, params: dict) -> None:
        logger.info("trial %d started: %s", number, params)

    def trial_reported(self, number: int, epoch: int, metrics: dict[str, float]) -> None: ...

    def trial_ended(self, record: TrialRecord) -> None:
        logger.info(
            "trial %d %s after %d epochs, objective %s, %.1f s%s",
            record.number,
            record.state,
            record.epochs,
            record.value,
            record.seconds,
            f": {record.reason}" if record.reason else "",
        )


class TrialFiles(Protocol):
    """Where trials leave files: the run folder, or its mirror in storage."""

    def remove_trial(self, number: int) -> None: ...

    def keep_logits(self, number: int) -> None: ...


class Checkpoints:
    """Removes what trials that have ended leave behind, but for the best one's validation logits.

    A trial's own end is too early: its workers may still be writing. So its files go with the end
    of the next one, and the last one's with the search.
    """

    def __init__(self, files: TrialFiles, mode: Mode, ended: list[TrialRecord]) -> None:
        """`ended`: trials of an interrupted search, whose last ones had no time to be swept."""
        self._files = files
        self._mode = mode
        self._ended = list(ended)
        self._best: TrialRecord | None = None

    def trial_started(self, number: int, config: TrialConfig, params: dict) -> None: ...

    def trial_reported(self, number: int, epoch: int, metrics: dict[str, float]) -> None: ...

    def trial_ended(self, record: TrialRecord) -> None:
        self.sweep()
        self._ended.append(record)

    def sweep(self) -> None:
        while self._ended:
            record = self._ended.pop()
            if record.state == "completed" and self._leads(record):
                if self._best is not None:
                    self._files.remove_trial(self._best.number)
                self._best = record
                self._files.keep_logits(record.number)
            else:
                self._files.remove_trial(record.number)

    def _leads(self, record: TrialRecord) -> bool:
        return self._best is None or record.rank(self._mode) < self._best.rank(self._mode)
