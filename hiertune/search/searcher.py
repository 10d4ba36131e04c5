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
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optuna.trial import Trial
from ray.tune.search import Searcher

from hiertune.config import TrialConfig
from hiertune.search.hyperband import Hyperband
from hiertune.search.ledger import EndState, Ledger
from hiertune.search.listeners import Listener
from hiertune.search.messages import Fault, Job

logger = logging.getLogger(__name__)

_MOST_LOST = 10
"""How often a trial is begun whose trial actor dies before its first epoch."""


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
        trials: how many there are to be in all, over all sessions.
        groups: how many worker groups there are at present; no more trials than that are live.
        check: does not return where a trial actor died because Ray is lost.
        hyperband: which trials train how far; else each one is trained to its end, or until Tune stops it.
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
        trials: int,
        groups: Callable[[], int] = lambda: sys.maxsize,
        check: Callable[[], None] = lambda: None,
        hyperband: Hyperband | None = None,
    ) -> None:
        super().__init__(metric=metric, mode=mode)
        self._ledger = ledger
        self._suggest = suggest
        self._make_job = make_job
        self._broker = broker
        self._listener = listener
        self._halted = halted
        self._enough = enough
        self._to_begin = trials - sum(record.state != "outside" for record in ledger.records())
        self._groups = groups
        self._check = check
        self._hyperband = hyperband
        self._live: dict[str, Trial] = {}
        self._begun: dict[str, float] = {}
        self._heard: set[str] = set()
        self._lost: Counter[int] = Counter()
        self._started: set[int] = set()
        self._logged: set[tuple[int, str]] = set()

    def suggest(self, trial_id: str) -> dict | str | None:  # type: ignore[override]  # FINISHED is a str
        if self._halted():
            return Searcher.FINISHED
        self._stop_the_worse()
        more = self._may_begin()
        if not (more or self._ledger.has_interrupted or self._live):  # one that is live may be lost
            return Searcher.FINISHED
        if len(self._live) >= self._groups() or (given := self._next(more)) is None:
            return None  # not now
        trial, until = given
        config = self._suggest(trial)
        self._to_begin -= self._ledger.begin(trial)
        self._live[trial_id] = trial
        self._begun[trial_id] = time.monotonic()
        if trial.number not in self._started:
            self._started.add(trial.number)
            self._listener.trial_started(trial.number, config, trial.params)
        job = self._make_job(trial.number, config).up_to(until)
        return {"broker": self._broker, "job": job, "metric": self.metric}

    def _may_begin(self) -> bool:
        """Whether there may be new trials."""
        return self._to_begin > 0 and not self._enough()

    def _next(self, more: bool) -> tuple[Trial, int | None] | None:
        """The trial to train next, and up to which epoch; None while those that wait wait for others."""
        if self._hyperband is not None:
            return self._hyperband.next(more)
        return (self._ledger.next_trial(), None) if more or self._ledger.has_interrupted else None

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        self._ledger.require()
        trial = self._live[trial_id]
        self._heard.add(trial_id)
        self._note(trial, result)
        self._report(trial, result)

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        if error:
            self._check()
        self._ledger.require()
        trial = self._live.pop(trial_id)
        result = result or {}
        seconds = time.monotonic() - self._begun.pop(trial_id)
        self._note(trial, result)
        if self._hyperband is not None:
            self._hyperband.let_go(trial.number)
        if result.get("state") in ("interrupted", "paused"):
            self._ledger.pause(trial, seconds)
            return  # no worker had it, and it goes on when the search resumes; or it waits for others
        if error and trial_id not in self._heard and self._lost[trial.number] < _MOST_LOST:
            # Tune gave it to an idle trial actor that had died, and does not try another one.
            self._lost[trial.number] += 1
            self._ledger.pause(trial, seconds)
            return
        state, reason, fault = _verdict(result, error)
        if state != "failed" and self.metric in result:
            self._report(trial, result)
        if state == "pruned" and self._halted():
            self._ledger.pause(trial, seconds)
            return  # stopped by the user or a budget, not by the scheduler: it goes on as well
        self._end(
            trial,
            state,
            value=result.get(self.metric),
            seconds=seconds,
            metrics=_metrics(result),
            reason=reason,
            fault=fault,
        )

    def _stop_the_worse(self) -> None:
        """Those that wait, and that Hyperband lets not go on."""
        if self._hyperband is None:
            return
        for number in self._hyperband.decide(self._may_begin()):
            self._ledger.require()
            trial = self._ledger.take_up(number)
            self._end(
                trial,
                "pruned",
                metrics=self._ledger.kept(trial),
                reason=_stopped_after(self._ledger.last_epoch(trial)),
            )

    def _end(self, trial: Trial, state: EndState, **how: Any) -> None:
        record = self._ledger.ending(trial, state, epochs=self._ledger.last_epoch(trial), **how)
        self._listener.trial_ended(record)
        self._ledger.tell(trial, record)

    def _report(self, trial: Trial, result: dict) -> None:
        epoch = result["training_iteration"]
        if not self._ledger.has(trial, epoch):
            self._listener.trial_reported(trial.number, epoch, _metrics(result))
            if self._hyperband is not None and self._hyperband.compares_at(trial.number, epoch):
                self._ledger.keep(trial, _metrics(result))
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
    return "pruned", _stopped_after(result.get("training_iteration", 0)), None


def _stopped_after(epoch: int) -> str:
    return f"stopped by the scheduler after epoch {epoch}"


def _metrics(result: dict) -> dict[str, float]:
    """Of the last epoch; none if there was no epoch."""
    return dict(result["measured"].metrics) if "measured" in result else {}
