"""The record of a search: Optuna's own storage, and the only place that says what a trial became.

Tune's snapshot and MLflow can lag behind or disagree after a crash; they are rebuilt from this.
A trial is RUNNING from the moment it is asked until it is told. What a crash leaves RUNNING is
taken up again under its own number when the search resumes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from hiertune.errors import InputError

Mode = Literal["max", "min"]
EndState = Literal["completed", "pruned", "failed"]
State = EndState | Literal["running"]

_STATES: dict[State, TrialState] = {
    "completed": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "running": TrialState.RUNNING,
}
_DIRECTIONS = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}
_NAMES = {state: name for name, state in _STATES.items()}


@dataclass(frozen=True)
class TrialRecord:
    """One trial, as the ledger has it."""

    number: int
    state: State
    params: dict[str, Any]
    value: float | None
    """The objective at the last epoch; None for failed trials."""
    reason: str | None = None
    epochs: int = 0
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)

    def rank(self, mode: Mode) -> tuple[float, int]:
        """Sorts completed trials from the best on; of equals the earliest comes first."""
        assert self.value is not None
        return (-self.value if mode == "max" else self.value), self.number


class Ledger:
    """The trials of one search, in an Optuna journal file."""

    def __init__(self, study: optuna.Study) -> None:
        self.study = study
        self.told: Callable[[], object] = lambda: None
        """Called after every `tell`, when it is in the journal."""
        self._interrupted = [
            frozen for frozen in study.get_trials(deepcopy=False) if frozen.state == TrialState.RUNNING
        ]

    @classmethod
    def open(cls, path: Path, name: str, mode: Mode, *, resume: bool) -> Ledger:
        """Create the journal at `path`, or with `resume` open it.

        Raises InputError where a journal to resume is missing or holds another objective's mode.
        """
        if resume and not path.exists():
            raise InputError("there is no search to resume here", file=path)
        direction = _DIRECTIONS[mode]
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = JournalStorage(JournalFileBackend(str(path)))
        study = optuna.create_study(
            storage=storage, study_name=name, direction=direction, load_if_exists=resume
        )
        if study.direction != direction:
            raise InputError(
                f"the search was begun with mode {'max' if mode == 'min' else 'min'}",
                file=path,
                key="search.objective.mode",
            )
        return cls(study)

    def next_trial(self) -> Trial:
        """The trial to run next: first those that an interruption left behind, then a new one."""
        if self._interrupted:
            return Trial(self.study, self._interrupted.pop(0)._trial_id)
        return self.study.ask()

    def begin(self, trial: Trial) -> None:
        """Note when the trial was first started."""
        if "started" not in trial.user_attrs:
            trial.set_user_attr("started", time.time())

    def report(self, trial: Trial, epoch: int, value: float) -> bool:
        """An epoch's objective. False for an epoch that was reported before: it is not reported again."""
        if epoch in trial.storage.get_trial(trial._trial_id).intermediate_values:
            return False
        trial.report(value, epoch)
        return True

    def tell(
        self,
        trial: Trial,
        state: EndState,
        *,
        value: float | None = None,
        epochs: int = 0,
        seconds: float = 0.0,
        metrics: Mapping[str, float] | None = None,
        reason: str | None = None,
    ) -> TrialRecord:
        """Write how the trial ended. The state comes last: without it the trial is still running."""
        for key, attr in {
            "epochs": epochs,
            "seconds": round(seconds, 3),
            "metrics": dict(metrics or {}),
            "reason": reason,
        }.items():
            trial.set_user_attr(key, attr)
        # A pruned trial's value is the last one it reported; Optuna takes it from there.
        frozen = self.study.tell(trial, value if state == "completed" else None, state=_STATES[state])
        self.told()
        return _record(frozen)

    def records(self) -> list[TrialRecord]:
        return [_record(frozen) for frozen in self.study.get_trials(deepcopy=False)]

    def ended(self) -> list[TrialRecord]:
        return [record for record in self.records() if record.state != "running"]

    def best(self) -> TrialRecord | None:
        """The completed trial with the best objective; the earliest of equals."""
        completed = [record for record in self.records() if record.state == "completed"]
        mode: Mode = "max" if self.study.direction == StudyDirection.MAXIMIZE else "min"
        return min(completed, key=lambda record: record.rank(mode), default=None)


def _record(frozen: FrozenTrial) -> TrialRecord:
    attrs = frozen.user_attrs
    steps = frozen.intermediate_values
    last = steps[max(steps)] if steps else None
    return TrialRecord(
        number=frozen.number,
        state=_NAMES.get(frozen.state, "running"),
        params=dict(frozen.params),
        value=frozen.value if frozen.state == TrialState.COMPLETE else last,
        reason=attrs.get("reason"),
        epochs=attrs.get("epochs", max(steps, default=0)),
        seconds=attrs.get("seconds", 0.0),
        metrics=attrs.get("metrics", {}),
    )
