"""When a search has had enough: the one place that decides, and the reason in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from hiertune.config import SearchSection
from hiertune.search.ledger import Mode, TrialRecord, Used
from hiertune.search.outputs import count_ended


@dataclass(frozen=True)
class Ending:
    """Why no more trials are begun."""

    by: Literal["trials", "time_budget", "worker_hours", "patience"]
    reason: str
    limit: float

    @property
    def cuts(self) -> bool:
        """Running trials end with their epoch, too. Else they go on to their own end."""
        return self.by in ("time_budget", "worker_hours")

    def sentence(self, states: Mapping[str, int], trials: int) -> str:
        """With how far the search has got: the number of trials in each state, and in all."""
        ended, interrupted = count_ended(states), states.get("interrupted", 0)
        count = (
            f"{ended} of {trials} trials" if ended <= trials else f"{ended} trials, {trials} were asked for"
        )
        rest = f", {interrupted} interrupted" if interrupted else ""
        return f"{self.reason}: {count}{rest}"


class Budget:
    """The limits of a search, over all its sessions.

    Args:
        search: the limits.
        trials: how many trials the search shall have.
        mode: which objective is better.
        ended: the trials of earlier sessions, in the order of their ends.
    """

    def __init__(self, search: SearchSection, trials: int, mode: Mode, ended: Iterable[TrialRecord]) -> None:
        self._search = search
        self._trials = trials
        self._mode = mode
        self._ended = 0
        self._best: TrialRecord | None = None
        self._in_vain = 0
        for record in ended:
            self._count(record)
        self._out_of_patience = self._is_in_vain

    def trial_ended(self, record: TrialRecord) -> None:
        self._count(record)
        # For good: no trial is begun after that, whatever becomes of those that still run.
        self._out_of_patience |= self._is_in_vain

    def _count(self, record: TrialRecord) -> None:
        self._ended += 1
        if record.state == "completed" and self._betters(record):
            self._best, self._in_vain = record, 0
        elif self._best is not None:
            self._in_vain += 1

    @property
    def _is_in_vain(self) -> bool:
        return self._search.patience is not None and self._in_vain >= self._search.patience

    def ending(self, used: Used) -> Ending | None:
        """None: there is something left of everything."""
        search = self._search
        if self._ended >= self._trials:
            return Ending("trials", "all trials ended", self._trials)
        if search.time_budget is not None and used.seconds >= search.time_budget:
            reason = f"time budget of {as_duration(search.time_budget)} spent"
            return Ending("time_budget", reason, search.time_budget)
        if search.worker_hours is not None and used.worker_seconds >= 3600 * search.worker_hours:
            reason = f"budget of {search.worker_hours:g} worker-hours spent"
            return Ending("worker_hours", reason, search.worker_hours)
        if search.patience is not None and self._out_of_patience:
            reason = f"no improvement in the last {max(self._in_vain, search.patience)} trials"
            return Ending("patience", reason, search.patience)
        return None

    def _betters(self, record: TrialRecord) -> bool:
        """Strictly: an equal objective is no improvement."""
        return self._best is None or record.rank(self._mode)[0] < self._best.rank(self._mode)[0]


def as_duration(seconds: float) -> str:
    """As it is written in YAML, in the largest unit that needs no fraction: `90m`, `12h`."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length and seconds % length == 0:
            return f"{seconds // length:.0f}{unit}"
    return f"{seconds:.10g}s"
