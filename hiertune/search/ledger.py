"""The record of a search: Optuna's own storage, and the only place that says what a trial became.

Tune's snapshot and MLflow can lag behind or disagree after a crash; they are rebuilt from this.
A trial is RUNNING from the moment it is asked until it is told. What a crash leaves RUNNING is
taken up again under its own number when the search resumes.

The sampler works on a copy in memory (`Ledger.study`), the storage gets what lasts: a trial whole as it
begins, each epoch's objective, its end. So a trial costs a few writes however many parameters it has,
and none is ever recorded with half of them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.metadata
import logging
import math
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from hiertune._journal import unsynced
from hiertune.errors import InputError
from hiertune.record import (
    END,
    OUTSIDE,
    SEARCH,
    STATES,
    EndState,
    Identity,
    Mode,
    Place,
    State,
    TrialRecord,
    newest_study,
    open_storage,
    record_of,
    searches_in,
)

__all__ = ["EndState", "Ledger", "LedgerLost", "Mode", "State", "TrialRecord"]

logger = logging.getLogger(__name__)

_DIRECTIONS = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}
_SESSION = "session:"
_PAUSES_S = (0.5, 1, 2, 4, 8, 16, 30)
"""How long a write waits between its tries while the database is away: a minute in all."""


class LedgerLost(RuntimeError):
    """The ledger can't be written to: the database is gone, the disk is full, another process took over."""


@dataclass(frozen=True)
class Used:
    """What a search has used of its budgets, over all sessions."""

    seconds: float
    """Wall time of the trials."""
    worker_seconds: float
    """Training time of the epochs that were reported, times the workers that trained them."""


class Ledger:
    """The trials of one search. One process writes; see `hiertune.search.owner`."""

    def __init__(self, place: Place, storage: BaseStorage, identity: Identity, study_id: int) -> None:
        self.place = place
        self.storage = storage
        self._mendable: tuple[type[Exception], ...] = (OSError, optuna.exceptions.StorageInternalError)
        if place.url is not None:
            from sqlalchemy.exc import DBAPIError

            self._mendable += (DBAPIError,)
        self.lost: str | None = None
        """Why nothing may be written any more."""
        self.confirm: Callable[[], object] = lambda: None
        """Called before every write; calls `lose` if it may not be done any more."""
        self.told: Callable[[], object] = lambda: None
        """Called after every `tell`, when it is recorded."""
        self._use(identity, study_id)

    @classmethod
    def open(
        cls,
        place: Place | Path,
        name: str,
        mode: Mode,
        *,
        resume: bool,
        metric: str = "",
        fingerprint: str = "",
        space: str = "",
    ) -> Ledger:
        """Begin a ledger at `place` (a path is a journal file), or with `resume` open it.

        Whoever calls holds the search's lock. `metric`, `fingerprint` (of the data) and `space` (the file's
        text, without passwords) are recorded as the search begins.

        Raises InputError where there is nothing to resume, where it is damaged or out of reach, or where
        what is asked can't be compared with what is there: another objective, other data.
        """
        if isinstance(place, Path):
            place = Place(place)
        if resume and place.url is None and not place.journal.exists():
            raise InputError("there is no search to resume here", file=place.journal)
        storage = open_storage(place, writable=True)
        wanted = Identity(
            name,
            uuid.uuid4().hex[:8],
            mode,
            1,
            metric,
            space,
            fingerprint,
            importlib.metadata.version("hiertune"),
        )
        if resume and place.url is not None and place.uid is None:
            if (uid := only_search(place, storage, name)) is None:
                resume = False
            else:
                place.point(uid)
        found = newest_study(place, storage)
        if found is None:
            if resume and place.url is not None:
                raise InputError(f"the database {place} does not hold this search", file=place.pointer)
            return cls(place, storage, wanted, _begin_study(place, storage, wanted))
        if not resume:
            raise InputError(
                "holds a search already", file=place.journal, allowed="`--resume`, or another name"
            )
        identity = _identity_of(found, wanted)
        _check_same(place, identity, wanted)
        if SEARCH not in found.user_attrs:
            storage.set_study_user_attr(found._study_id, SEARCH, identity.to_attr())
        return cls(place, storage, identity, found._study_id)

    def refresh(self) -> None:
        """Read it again."""
        found = newest_study(self.place, self.storage)
        assert found is not None
        self._use(_identity_of(found, self.identity), found._study_id)

    @functools.cached_property
    def first_id(self) -> int:
        """Of the first revision's study."""
        return self.storage.get_study_id_from_name(replace(self.identity, revision=1).study_name)

    def _use(self, identity: Identity, study_id: int) -> None:
        """Read the study, and copy it into memory."""
        self.identity = identity
        self.study_id = study_id
        trials = self.storage.get_all_trials(study_id, deepcopy=False)
        self._ids = [trial._trial_id for trial in trials]
        self._system_attrs = dict(self.storage.get_study_system_attrs(study_id))
        attrs = self.storage.get_study_user_attrs(study_id)
        self._sessions = {
            int(key.removeprefix(_SESSION)): attrs[key] for key in attrs if key.startswith(_SESSION)
        }
        self._ended: dict[int, TrialRecord] = {}
        self._memory = _Memory()
        directions = [_DIRECTIONS[identity.mode]]
        memory_id = self._memory.create_new_study(directions, identity.study_name)
        for key, value in self._system_attrs.items():
            self._memory.set_study_system_attr(memory_id, key, value)
        for frozen in trials:
            self._memory.create_new_trial(memory_id, frozen)
        for frozen in sorted(trials, key=lambda trial: trial.datetime_complete or datetime.max):
            self._remember(record_of(frozen))
        # As long as nobody sets another one: Optuna would make a TPE sampler of its own.
        sampler = optuna.samplers.RandomSampler()
        self.study = optuna.load_study(study_name=identity.study_name, storage=self._memory, sampler=sampler)
        self._left: dict[int, Trial | None] = {
            trial.number: None for trial in trials if trial.state == TrialState.RUNNING
        }
        """Open trials that nobody has; those that this session had with what the sampler drew for them."""

    # ------------------------------------------------------------------------------- one trial

    def next_trial(self) -> Trial:
        """The trial to run next: first those that an interruption left behind, then a new one."""
        return self.take_up(next(iter(self._left))) if self._left else self.study.ask()

    def take_up(self, number: int) -> Trial:
        """A trial that was begun before, and that nobody has now."""
        return self._left.pop(number) or Trial(self.study, self._memory.id_of(number))

    def waits(self, number: int) -> bool:
        """Whether the trial is open, and nobody has it."""
        return number in self._left

    @property
    def has_interrupted(self) -> bool:
        """Whether `next_trial` will give one that was begun before."""
        return bool(self._left)

    def begin(self, trial: Trial) -> bool:
        """Record the trial with the parameters that were suggested; of one that goes on, those it lacked.

        Returns whether it is a new one.
        """
        if trial.number >= len(self._ids):
            assert trial.number == len(self._ids), "trials begin in the order in which they were asked"
            self._begin_new(trial)
            return True
        self._lasting(lambda: self._complete_params(trial))
        return False

    def _begin_new(self, trial: Trial) -> None:
        # The sampler's notes on the study first: a trial that is lost leaves a gap, not a repetition.
        for key, value in self.study._storage.get_study_system_attrs(self.study._study_id).items():
            if self._system_attrs.get(key) != value:
                self._lasting(
                    functools.partial(self.storage.set_study_system_attr, self.study_id, key, value)
                )
                self._system_attrs[key] = copy.deepcopy(value)
        trial.set_user_attr("started", time.time())
        frozen = self._memory.get_trial(trial._trial_id)
        self._ids.append(self._lasting(lambda: self.storage.create_new_trial(self.study_id, frozen)))

    def _complete_params(self, trial: Trial) -> None:
        recorded = self.storage.get_trial(self._ids[trial.number])
        frozen = self._memory.get_trial(trial._trial_id)
        for name, distribution in frozen.distributions.items():
            if name not in recorded.distributions:
                value = distribution.to_internal_repr(frozen.params[name])
                self.storage.set_trial_param(recorded._trial_id, name, value, distribution)

    def has(self, trial: Trial, epoch: int) -> bool:
        """Whether an epoch of the trial is recorded."""
        return epoch in self._memory.get_trial(trial._trial_id).intermediate_values

    def last_epoch(self, trial: Trial) -> int:
        """The last epoch of the trial that is recorded; 0 if there is none."""
        return max(self._memory.get_trial(trial._trial_id).intermediate_values, default=0)

    def report(self, trial: Trial, epoch: int, value: float) -> bool:
        """Record an epoch's objective. False for an epoch that is recorded: it is not recorded again."""
        if self.has(trial, epoch):
            return False
        at = self._recorded(trial)
        self._lasting(lambda: self.storage.set_trial_intermediate_value(at, epoch, value))
        self._memory.set_trial_intermediate_value(trial._trial_id, epoch, value)
        return True

    def note(self, trial: Trial, incidents: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Record what the trial survived. Returns what was not recorded before."""
        known = list(trial.user_attrs.get("incidents", ()))
        new = [dict(incident) for incident in incidents if dict(incident) not in known]
        if new:
            self._set_attr(trial, "incidents", known + new)
        return new

    def pause(self, trial: Trial, seconds: float) -> None:
        """Nobody has the trial any more, and it is to go on: record how long it took."""
        self._set_attr(trial, "seconds", round(_spent(trial) + seconds, 3))
        self._left[trial.number] = trial

    def keep(self, trial: Trial, metrics: Mapping[str, float]) -> None:
        """Record the metrics of an epoch that may be the trial's last, and it is not known yet."""
        self._set_attr(trial, "metrics", dict(metrics))

    def kept(self, trial: Trial) -> dict[str, float]:
        """The metrics that `keep` recorded last."""
        return trial.user_attrs.get("metrics", {})

    def ending(
        self,
        trial: Trial,
        state: EndState,
        *,
        value: float | None = None,
        epochs: int = 0,
        seconds: float = 0.0,
        metrics: Mapping[str, float] | None = None,
        reason: str | None = None,
        fault: str | None = None,
    ) -> TrialRecord:
        """How the trial ended, without recording it. An objective that is no number is a failure.

        Args:
            seconds: in this session; those of earlier ones are added.
        """
        if state == "completed" and (value is None or not math.isfinite(value)):
            state, fault = "failed", fault or "diverged"
            reason = reason or f"the objective is {value}"
        steps = self._memory.get_trial(trial._trial_id).intermediate_values
        return TrialRecord(
            number=trial.number,
            state=state,
            params=dict(trial.params),
            value=value if state == "completed" else steps[max(steps)] if steps else None,
            reason=reason,
            epochs=epochs,
            seconds=round(_spent(trial) + seconds, 3),
            metrics=dict(metrics or {}),
            fault=fault,
            incidents=tuple(trial.user_attrs.get("incidents", ())),
        )

    def tell(self, trial: Trial, end: TrialRecord | EndState, **how: Any) -> TrialRecord:
        """Record how the trial ended: what `ending` made, or its arguments.

        The state comes last: without it the trial is still running.
        """
        record = end if isinstance(end, TrialRecord) else self.ending(trial, end, **how)
        assert record.state in STATES
        state = STATES[record.state]
        values = None
        if record.value is not None and not math.isnan(record.value) and record.state != "failed":
            values = [record.value]  # of a pruned trial the last one that it reported, as Optuna has it
        at = self._recorded(trial)
        keys = ("epochs", "seconds", "metrics", "reason", "fault")
        end_attr = {key: getattr(record, key) for key in keys}
        self._set_attr(trial, END, end_attr)

        def finish() -> None:
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                self.storage.set_trial_state_values(at, state, values)

        self._lasting(finish)
        self.study.tell(trial, record.value if state == TrialState.COMPLETE else None, state=state)
        self._remember(record)
        self.told()
        return record

    def _recorded(self, trial: Trial) -> int:
        """The storage's id of the trial, which begins if it has not."""
        if trial.number >= len(self._ids):
            self.begin(trial)
        return self._ids[trial.number]

    def _set_attr(self, trial: Trial, key: str, value: Any) -> None:
        at = self._recorded(trial)
        self._lasting(lambda: self.storage.set_trial_user_attr(at, key, value))
        trial.set_user_attr(key, value)

    # ------------------------------------------------------------------------------- all trials

    def note_session(self, number: int, *, begun: float, seconds: float, worker_seconds: float) -> None:
        """Write how much the `number`-th session (a run of the driver) has used so far; again and again,
        since a killed one can't at its end. `begun` is in seconds since 1970."""
        session = {"begun": begun, "seconds": seconds, "worker_seconds": worker_seconds}
        self.set_study_attr(f"{_SESSION}{number}", session)
        self._sessions[number] = session

    def sessions(self) -> list[dict[str, float]]:
        """As they were last noted, in their order."""
        return [self._sessions[number] for number in sorted(self._sessions)]

    def used(self) -> Used:
        sessions = self.sessions()
        return Used(
            sum(session["seconds"] for session in sessions),
            sum(session["worker_seconds"] for session in sessions),
        )

    def records(self) -> list[TrialRecord]:
        """Every trial that is recorded, by number."""
        return [
            self._ended.get(number) or record_of(self._frozen(number)) for number in range(len(self._ids))
        ]

    def ended(self) -> list[TrialRecord]:
        """Trials that count, in the order of their ends: none that runs or is outside the space."""
        return [record for record in self._ended.values() if record.state != "outside"]

    def best(self) -> TrialRecord | None:
        """The completed trial with the best objective; the earliest of equals."""
        completed = [record for record in self._ended.values() if record.state == "completed"]
        return min(completed, key=lambda record: record.rank(self.identity.mode), default=None)

    def state_of(self, number: int) -> State:
        return self._ended[number].state if number in self._ended else "running"

    def reported(self, number: int) -> Mapping[int, float]:
        """A trial's objective by epoch; nothing of one that is outside the space."""
        return {} if self.state_of(number) == "outside" else self._frozen(number).intermediate_values

    def attrs(self) -> list[dict[str, Any]]:
        """What is recorded beside each trial, by number."""
        return [self._frozen(number).user_attrs for number in range(len(self._ids))]

    def epochs(self) -> dict[int, dict[int, float]]:
        """The objective by epoch of every trial inside the space, by number."""
        numbers = [
            n for n in range(len(self._ids)) if n not in self._ended or self._ended[n].state != "outside"
        ]
        return {number: dict(sorted(self._frozen(number).intermediate_values.items())) for number in numbers}

    def _frozen(self, number: int) -> FrozenTrial:
        return self._memory.get_trial(self._memory.id_of(number))

    def _remember(self, record: TrialRecord) -> None:
        if record.state != "running":
            self._ended[record.number] = record

    # ------------------------------------------------------------------------------- revisions

    def revise(self, space: str, carry: Callable[[FrozenTrial, TrialRecord], FrozenTrial]) -> None:
        """Begin a new revision for another space: a study with all trials, under their numbers.

        `carry` gives each trial as it is to be there (`carried_over`, `put_outside`). Killed on the way,
        the old revision still holds, and the copy is made anew.
        """
        identity = replace(
            self.identity,
            revision=self.identity.revision + 1,
            space=space,
            version=importlib.metadata.version("hiertune"),
        )
        for study in self.storage.get_all_studies():
            if study.study_name == identity.study_name:
                assert SEARCH not in study.user_attrs
                self.storage.delete_study(study._study_id)
        study_id = self.storage.create_new_study([_DIRECTIONS[identity.mode]], identity.study_name)
        copies = [carry(self._frozen(number), record) for number, record in enumerate(self.records())]
        with unsynced(self.storage):
            for frozen in copies:
                self.storage.create_new_trial(study_id, frozen)
        for key, value in self.storage.get_study_user_attrs(self.study_id).items():
            if key not in (SEARCH, "session"):  # a session stays with the first revision
                self.storage.set_study_user_attr(study_id, key, value)
        self.storage.set_study_user_attr(study_id, SEARCH, identity.to_attr())
        self._use(identity, study_id)

    def space_of(self, revision: int) -> str:
        """The text of an earlier revision's space; empty if it is not known."""
        texts = {
            identity.revision: identity.space
            for identity, _ in searches_in(self.storage)
            if identity.uid == self.identity.uid
        }
        return texts.get(revision, "")

    # ------------------------------------------------------------------------------- writing

    def set_study_attr(self, key: str, value: Any) -> None:
        self._lasting(lambda: self.storage.set_study_user_attr(self.study_id, key, value))

    def _lasting(self, write: Callable[[], Any]) -> Any:
        """Do a write that may be repeated, again and again while the database is away."""
        pauses: Iterator[float] = iter(_PAUSES_S if self.place.url is not None else ())
        while True:
            self.require()
            try:
                self.confirm()
                self.require()
                return write()
            except self._mendable as error:
                pause = next(pauses, None)
                words = str(error.__cause__ or error).splitlines()[0]
                if pause is None:
                    self.lose(words)
                    raise LedgerLost(self.lost) from error
                logger.warning("the ledger %s can't be written to, trying again: %s", self.place, words)
                time.sleep(pause)

    def require(self) -> None:
        """Raise LedgerLost if nothing may be written any more."""
        if self.lost is not None:
            raise LedgerLost(self.lost)

    def lose(self, why: str) -> None:
        """Write nothing more."""
        self.lost = f"the ledger {self.place} can't be written to: {why}"


class _Memory(InMemoryStorage):
    """Trials in memory, as samplers see them: those outside the space keep their number and are not seen."""

    def get_all_trials(self, study_id: int, deepcopy: bool = True, states: Any = None) -> list[FrozenTrial]:
        trials = super().get_all_trials(study_id, deepcopy, states)
        return [trial for trial in trials if OUTSIDE not in trial.user_attrs]

    def id_of(self, number: int) -> int:
        return number  # one study, begun empty: ids count as numbers do


def _spent(trial: Trial) -> float:
    return trial.user_attrs.get("seconds", 0.0)


def carried_over(
    frozen: FrozenTrial,
    params: Mapping[str, Any],
    distributions: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> FrozenTrial:
    """A trial of an earlier revision with the parameters that give its config in the present space."""
    attrs = {key: value for key, value in frozen.user_attrs.items() if key != OUTSIDE}
    if provenance:
        attrs["carried"] = dict(provenance)
    copied = copy.copy(frozen)
    copied.user_attrs = attrs
    copied.params, copied.distributions = dict(params), dict(distributions)
    outside = frozen.user_attrs.get(OUTSIDE)
    if outside:
        copied.state = TrialState[outside["state"]]
        copied.values = outside["values"]
        if not copied.state.is_finished():
            copied.datetime_complete = None
    copied.system_attrs = {}  # the sampler's notes are on the old space
    return copied


def put_outside(frozen: FrozenTrial, config: Mapping[str, Any], reason: str, revision: int) -> FrozenTrial:
    """A trial whose `config` the present space does not hold: on record, but no longer part of the search."""
    if OUTSIDE in frozen.user_attrs:
        return frozen
    # FAIL, as samplers and dashboards then leave it alone; its own state and values are in the attribute.
    outside = {
        "state": frozen.state.name,
        "values": frozen.values,
        "params": dict(frozen.params),
        "config": dict(config),
        "reason": reason,
        "revision": revision,
    }
    made = create_trial(
        state=TrialState.FAIL,
        user_attrs=frozen.user_attrs | {OUTSIDE: outside},
        intermediate_values=frozen.intermediate_values,
    )
    made.number = frozen.number
    made.datetime_start = frozen.datetime_start
    made.datetime_complete = frozen.datetime_complete or made.datetime_complete
    return made


def _begin_study(place: Place, storage: BaseStorage, identity: Identity) -> int:
    study_id = storage.create_new_study([_DIRECTIONS[identity.mode]], identity.study_name)
    storage.set_study_user_attr(study_id, SEARCH, identity.to_attr())
    if place.url is not None:
        place.point(identity.uid)
    return study_id


def only_search(place: Place, storage: BaseStorage, name: str) -> str | None:
    """The uid of the search of that name in a database, for a folder that is not there, or lost its pointer.

    None for a folder that was about to have one, and whose search has no trials yet: it may begin again.
    """
    named = [(identity, study) for identity, study in searches_in(storage) if identity.name == name]
    uids = sorted({found.uid for found, study in named if storage.get_n_trials(study._study_id)})
    if len(uids) == 1:
        return uids[0]
    if not uids and place.pointer.exists():
        return None
    problem = f"the database {place} holds {len(uids) or 'no'} searches named {name!r}"
    raise InputError(
        problem, key="name", allowed=f"its run folder, with {place.pointer.name}" if uids else None
    )


def _identity_of(study: FrozenStudy, wanted: Identity) -> Identity:
    if SEARCH in study.user_attrs:
        return Identity(**study.user_attrs[SEARCH])
    mode: Mode = "max" if study.direction == StudyDirection.MAXIMIZE else "min"
    return replace(wanted, mode=mode)


def _check_same(place: Place, begun: Identity, wanted: Identity) -> None:
    if begun.mode != wanted.mode:
        raise InputError(
            f"the search was begun with mode {begun.mode}",
            file=str(place),
            key="search.objective.mode",
            allowed=f"{begun.mode}, or another name for another search",
        )
    if begun.metric and wanted.metric and begun.metric != wanted.metric:
        raise InputError(
            f"the search was begun with the objective {begun.metric}, and this is {wanted.metric}",
            file=str(place),
            key="search.objective.metric",
            allowed=f"{begun.metric}, or another name for another search",
        )
    if begun.fingerprint and wanted.fingerprint and begun.fingerprint != wanted.fingerprint:
        raise InputError(
            f"the data is not what the search was begun with (fingerprint {wanted.fingerprint[:16]}, "
            f"then {begun.fingerprint[:16]}): results could not be compared",
            file=str(place),
            key="data",
            allowed="the same data, or another name for another search",
        )
