"""Between Tune and the ledger: what Tune asks becomes an Optuna trial, what it says is told honestly.

Ray's own OptunaSearch tells a trial that the scheduler stopped as COMPLETE with an early value,
which misleads the sampler, and leaves failed ones RUNNING for ever.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from optuna.trial import Trial
from ray.tune.search import Searcher

from hiertune.config import TrialConfig
from hiertune.search.ledger import EndState, Ledger
from hiertune.search.listeners import Listener
from hiertune.search.messages import Job

logger = logging.getLogger(__name__)


class LedgerSearcher(Searcher):
    """Tune's searcher over a `Ledger`.

    Args:
        ledger: where trials are asked and told.
        suggest: resolves the space for an Optuna trial.
        make_job: what a trial trains, from its number and config.
        broker: name of the broker actor, for the trial actors.
        metric: the objective.
        limit: number of trials after which the search is finished.
        interrupted: while it says True, trials that Tune stops stay open in the ledger.
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
        interrupted: Callable[[], bool],
    ) -> None:
        super().__init__(metric=metric, mode=mode)
        self._ledger = ledger
        self._suggest = suggest
        self._make_job = make_job
        self._broker = broker
        self._listener = listener
        self._interrupted = interrupted
        self._live: dict[str, Trial] = {}
        self._begun: dict[str, float] = {}

    def suggest(self, trial_id: str) -> dict | str:  # type: ignore[override]  # FINISHED is a str
        if self._interrupted():
            return Searcher.FINISHED
        trial = self._ledger.next_trial()
        config = self._suggest(trial)
        self._ledger.begin(trial)
        self._live[trial_id] = trial
        self._begun[trial_id] = time.monotonic()
        self._listener.trial_started(trial.number, config, trial.params)
        return {"broker": self._broker, "job": self._make_job(trial.number, config), "metric": self.metric}

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        self._report(self._live[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        trial = self._live.pop(trial_id)
        result = result or {}
        state, reason = _verdict(result, error)
        if state != "failed" and self.metric in result:
            self._report(trial, result)
        if state == "pruned" and self._interrupted():
            return  # stopped by the user, not by the scheduler: it goes on when the search resumes
        record = self._ledger.tell(
            trial,
            state,
            value=result.get(self.metric),
            epochs=result.get("training_iteration", 0),
            seconds=time.monotonic() - self._begun.pop(trial_id),
            metrics=_metrics(result),
            reason=reason,
        )
        self._listener.trial_ended(record)

    def _report(self, trial: Trial, result: dict) -> None:
        epoch = result["training_iteration"]
        if self._ledger.report(trial, epoch, result[self.metric]):
            for note in result.get("notes", ()):
                logger.info("trial %d: %s", trial.number, note)
            self._listener.trial_reported(trial.number, epoch, _metrics(result))

    def __getstate__(self) -> dict:
        """For Tune's snapshot, which is never restored."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Tune wants a file; the ledger is the record, so there is nothing to put in it."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        raise AssertionError("a search is resumed from its ledger, never from Tune's snapshot")


def _verdict(result: dict, error: bool) -> tuple[EndState, str | None]:
    if error:
        return "failed", "its trial actor died"
    if result.get("state") == "failed":
        return "failed", result["reason"]
    if result.get("state") == "completed":
        return "completed", None
    return "pruned", f"stopped by the scheduler after epoch {result.get('training_iteration', 0)}"


def _metrics(result: dict) -> dict[str, float]:
    """Of the last epoch; none if there was no epoch."""
    return dict(result["measured"].metrics) if "measured" in result else {}
