"""One run of the driver over the search's trials: what it uses of the budgets, and when it has to stop."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from hiertune.config import TrialConfig
from hiertune.search.budget import Budget, Ending
from hiertune.search.display import Display
from hiertune.search.failures import FailureStreak
from hiertune.search.interrupt import Interruption
from hiertune.search.ledger import Ledger, TrialRecord, Used

logger = logging.getLogger(__name__)

_TICK_S = 1.0
_LEAST_BEAT_S, _LONGEST_BEAT_S = 5.0, 60.0


class Session:
    """Watches the budgets and the user, while trials run; a listener and a context manager.

    A thread of its own looks at them every second, so that trials which wait for workers do not outlast
    them, and writes to the ledger how long the session has lasted: of a killed one that is known to 1%,
    and to within 5 to 60 seconds.

    Args:
        budget: already knows the trials of earlier sessions.
        workers: processes that train one trial.
        streak: of trials that failed for one cause; a broken one halts too.
        halt: called once, from that thread, when running trials shall end with their epochs.
        clock: seconds, from whenever.
    """

    def __init__(
        self,
        ledger: Ledger,
        budget: Budget,
        interruption: Interruption,
        display: Display,
        workers: int,
        halt: Callable[[], None],
        streak: FailureStreak,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger = ledger
        self._budget = budget
        self._interruption = interruption
        self._display = display
        self._workers = workers
        self._halt = halt
        self._streak = streak
        self._clock = clock
        self._before = ledger.used()
        self._begun, self._begun_at = clock(), time.time()
        self._noted = self._begun
        self._told = ""
        self._halting = False
        self._trained_s = 0.0
        self._number = len(ledger.sessions())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Session:
        self._note()
        self._thread.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._over.set()
        self._thread.join(_TICK_S)  # after Ctrl-C twice it may hang in `halt`
        self._note()

    @property
    def used(self) -> Used:
        """Of all sessions."""
        return Used(
            self._before.seconds + self._clock() - self._begun,
            self._before.worker_seconds + self._trained_s * self._workers,
        )

    @property
    def ending(self) -> Ending | None:
        """Why no new trial is to be begun."""
        return self._budget.ending(self.used)

    @property
    def halted(self) -> bool:
        """Whether running trials shall end with their epochs and stay open."""
        ending = self.ending
        cut = ending is not None and ending.cuts
        return cut or self._interruption.asked or self._streak.broken

    # ------------------------------------------------------------------------- listener

    def trial_started(self, number: int, config: TrialConfig, params: dict) -> None: ...

    def trial_reported(self, number: int, epoch: int, metrics: dict[str, float]) -> None:
        self._trained_s += metrics.get("epoch_seconds", 0.0)

    def trial_ended(self, record: TrialRecord) -> None:
        self._budget.trial_ended(record)
        self._streak.trial_ended(record)

    # --------------------------------------------------------------------------- inside

    def _tick(self) -> None:
        while not self._over.wait(_TICK_S):
            try:
                self.look()
            except Exception:  # a note that can't be written must not end the watch
                logger.exception("the budgets could not be looked at")

    def look(self) -> None:
        """What the thread does every second."""
        now = self._clock()
        if now - self._noted >= min(max(_LEAST_BEAT_S, 0.01 * (now - self._begun)), _LONGEST_BEAT_S):
            self._note()
        ending = None if self._interruption.asked else self.ending
        if ending is not None or self._interruption.asked:
            reason = "asked" if ending is None else ending.by
            if reason not in {"trials", self._told}:
                self._told = reason
                self._display.stopping(ending)
        if self.halted and not self._halting and not self._over.is_set():  # `_note` may have taken its time
            self._halting = True
            self._halt()

    def _note(self) -> None:
        self._noted = self._clock()
        used = self.used
        self._ledger.note_session(
            self._number,
            begun=self._begun_at,
            seconds=used.seconds - self._before.seconds,
            worker_seconds=used.worker_seconds - self._before.worker_seconds,
        )
