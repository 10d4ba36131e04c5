"""Between Tune and the ledger: what Tune asks becomes an Optuna trial, what it says is told honestly.

Ray's own OptunaSearch tells a trial that the scheduler stopped as COMPLETE with an early value,
which misleads the sampler, and leaves failed ones RUNNING for ever.

A trial is in the ledger before anybody hears of it, as the ledger gives it its number; of its epochs and
its end the listeners hear first and the ledger last. What a kill in between left untold is told again when
the search resumes, so a listener takes what it has heard as nothing new. Once the ledger is lost nobody hears
anything: listeners remove the checkpoints of trials that have ended, and those go on when the search resumes.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

from optuna.trial import Trial
from ray.tune.search import Searcher

from hiertune.config import TrialConfig
from hiertune.search.ledger import EndState, Ledger
from hiertune.search.listeners import Listener
from hiertune.search.messages import Fault, Job

logger = logging.getLogger(__name__)


class LedgerSearcher(Searcher):
    """Tune's searcher over a `Ledger`.

    Args:
        ledger: where trials are asked and told.
        suggest: resolves the space for an Optuna trial.
        make_job: what a trial trains, from its number and config.
        broker: name of the broker actor, for the trial actors.
        metric: the objective.
        halted: from when it says True, trials that Tune stops stay open in the ledger.
        enough: from when it says True, only trials that an interruption left behind are begun.
        groups: how many worker groups there are at present; no more trials than that are live.
        check: does not return where a trial actor died because Ray is lost.
    """

    def __init__(
        self,
        ledger: Ledger,
        suggest: Callable[[Trial], TrialConfig],
        make_job: Callable[[int, TrialConfig], Job],
        broker: str,
        metric: str,
        mode: str,
        listener: Listener,
        halted: Callable[[], bool],
        enough: Callable[[], bool],
        groups: Callable[[], int] = lambda: sys.maxsize,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(metric=metric, mode=mode)
        self._ledger = ledger
        self._suggest = suggest
        self._make_job = make_job
        self._broker = broker
        self._listener = listener
        self._halted = halted
        self._enough = enough
        self._groups = groups
        self._check = check
        self._live: dict[str, Trial] = {}
        self._begun: dict[str, float] = {}
        self._last: dict[str, dict] = {}
        self._logged: set[tuple[int, str]] = set()

    def suggest(self, trial_id: str) -> dict | str | None:  # type: ignore[override]  # FINISHED is a str
        if self._halted() or (self._enough() and not self._ledger.has_interrupted):
            return Searcher.FINISHED
        if len(self._live) >= self._groups():
            return None  # not now
        trial = self._ledger.next_trial()
        config = self._suggest(trial)
        self._ledger.begin(trial)
        self._live[trial_id] = trial
        self._begun[trial_id] = time.monotonic()
        self._listener.trial_started(trial.number, config, trial.params)
        return {"broker": self._broker, "job": self._make_job(trial.number, config), "metric": self.metric}

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        self._ledger.require()
        trial = self._live[trial_id]
        self._note(trial, result)
        self._report(trial, result)
        self._last[trial_id] = result

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        if error:
            self._check()
        self._ledger.require()
        trial = self._live.pop(trial_id)
        last = self._last.pop(trial_id, {})
        result = result or ({} if error else last)  # of one that it had paused (Hyperband) Tune says nothing
        seconds = time.monotonic() - self._begun.pop(trial_id)
        self._note(trial, result)
        if result.get("state") == "interrupted":
            self._ledger.pause(trial, seconds)
            return  # no worker had it; it goes on when the search resumes
        state, reason, fault = _verdict(result, error)
        if state != "failed" and self.metric in result:
            self._report(trial, result)
        if state == "pruned" and self._halted():
            self._ledger.pause(trial, seconds)
            return  # stopped by the user or a budget, not by the scheduler: it goes on as well
        record = self._ledger.ending(
            trial,
            state,
            value=result.get(self.metric),
            epochs=self._ledger.last_epoch(trial),
            seconds=seconds,
            metrics=_metrics(result),
            reason=reason,
            fault=fault,
        )
        self._listener.trial_ended(record)
        self._ledger.tell(trial, record)

    def _report(self, trial: Trial, result: dict) -> None:
        epoch = result["training_iteration"]
        if not self._ledger.has(trial, epoch):
            self._listener.trial_reported(trial.number, epoch, _metrics(result))
            self._ledger.report(trial, epoch, result[self.metric])

    def _note(self, trial: Trial, result: dict) -> None:
        """What is worth a line in the log, whether its epoch is new or repeated."""
        for incident in self._ledger.note(trial, result.get("incidents", ())):
            logger.warning(
                "trial %d goes on after epoch %d: %s", trial.number, incident["epoch"], incident["reason"]
            )
        for note in result.get("notes", ()):
            if (trial.number, note) not in self._logged:
                self._logged.add((trial.number, note))
                logger.info("trial %d: %s", trial.number, note)

    def __getstate__(self) -> dict:
        """For Tune's snapshot, which is never restored."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Tune wants a file; the ledger is the record, so there is nothing to put in it."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        raise AssertionError("a search is resumed from its ledger, never from Tune's snapshot")


def _verdict(result: dict, error: bool) -> tuple[EndState, str | None, Fault | None]:
    if error:
        return "failed", "its trial actor died again and again", "lost"
    if result.get("state") == "failed":
        return "failed", result["reason"], result["fault"]
    if result.get("state") == "completed":
        return "completed", None, None
    return "pruned", f"stopped by the scheduler after epoch {result.get('training_iteration', 0)}", None


def _metrics(result: dict) -> dict[str, float]:
    """Of the last epoch; none if there was no epoch."""
    return dict(result["measured"].metrics) if "measured" in result else {}
