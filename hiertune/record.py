"""The record of a search as anyone may read it: what became of every trial, in Optuna's storage.

Read by the report, written by `hiertune.search.ledger`. A ledger holds a study for every revision of the
space: a study can't change its choices, so a changed space begins a new one, into which the trials are
copied. The newest that was copied whole counts.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import optuna
from optuna.storages import BaseStorage, RDBStorage
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from hiertune._database import Place, engine_arguments, unreachable
from hiertune._journal import open_journal
from hiertune.errors import InputError

Mode = Literal["max", "min"]
EndState = Literal["completed", "pruned", "failed"]
State = EndState | Literal["running", "outside"]
"""`outside`: of an earlier revision, with a config that the present space does not hold."""

SEARCH = "search"
"""Study attribute: the `Identity`. Written last, so a study that has it is whole."""
END = "end"
"""Trial attribute: how it ended, all but the state."""
OUTSIDE = "outside"
"""Trial attribute of those outside: their own state, values, params and config, the reason, the revision."""

STATES: dict[EndState, TrialState] = {
    "completed": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
_NAMES: dict[TrialState, State] = {state: name for name, state in STATES.items()}


@dataclass(frozen=True)
class Identity:
    """What a study says of its search, so that a ledger needs no file beside it."""

    name: str
    uid: str
    """Tells searches of one name on one database apart."""
    mode: Mode
    revision: int = 1
    metric: str = ""
    space: str = ""
    """Text of the space file, without passwords."""
    fingerprint: str = ""
    """Of the data."""
    version: str = ""
    """Of hiertune, when the revision was begun."""

    @property
    def study_name(self) -> str:
        return f"{self.name}-{self.uid}" + (f" (revision {self.revision})" if self.revision > 1 else "")

    def to_attr(self) -> dict[str, Any]:
        return asdict(self)


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
    fault: str | None = None
    """Of a failed trial: what went wrong (`hiertune.search.messages.Fault`)."""
    incidents: tuple[dict[str, Any], ...] = ()
    """Faults after which it went on from its checkpoint: fault, reason, epoch, time."""

    @property
    def attempts(self) -> int:
        return 1 + len(self.incidents)

    def rank(self, mode: Mode) -> tuple[float, int]:
        """Sorts completed trials from the best on; of equals the earliest comes first."""
        assert self.value is not None
        return (-self.value if mode == "max" else self.value), self.number


def record_of(frozen: FrozenTrial) -> TrialRecord:
    attrs = frozen.user_attrs
    outside = attrs.get(OUTSIDE)
    end = attrs.get(END, attrs)
    steps = frozen.intermediate_values
    last = steps[max(steps)] if steps else None
    return TrialRecord(
        number=frozen.number,
        state="outside" if outside else _NAMES.get(frozen.state, "running"),
        params=dict(outside["params"] if outside else frozen.params),
        value=frozen.value if frozen.state == TrialState.COMPLETE else last,
        reason=outside["reason"] if outside else end.get("reason"),
        epochs=end.get("epochs", max(steps, default=0)),
        seconds=end.get("seconds", attrs.get("seconds", 0.0)),
        metrics=end.get("metrics", {}),
        fault=end.get("fault"),
        incidents=tuple(attrs.get("incidents", ())),
    )


PARAM = "param/"
"""Prefix of a parameter's column in trials.csv."""


def row_of(record: TrialRecord) -> dict[str, Any]:
    """A trial as a row of a table: id, state, every parameter, every final metric, epochs, seconds."""
    return {
        "trial": record.number,
        "state": record.state,
        "reason": record.reason,
        "fault": record.fault,
        "attempts": record.attempts,
        "epochs": record.epochs,
        "seconds": record.seconds,
        "objective": record.value,
        **{PARAM + name: value for name, value in record.params.items()},
        **record.metrics,
    }


# ------------------------------------------------------------------------------------- reading


def open_storage(place: Place, *, writable: bool = False) -> BaseStorage:
    """InputError where the file is damaged or the database doesn't answer."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if place.url is None:
        return open_journal(place.journal, writable=writable)
    # When a database is away it tries something slower, and says so; we say what is wrong.
    logging.getLogger("optuna.storages._rdb").setLevel(logging.ERROR)
    with answering(place):
        try:
            # Without Optuna's cache in between: what is read once is read fresh, and the writer remembers.
            return _Database(place.url.replace("{", "{{").replace("}", "}}"), engine_arguments(place.url))
        except RuntimeError as error:  # tables of another version of Optuna
            raise unreachable(place.url, error) from None


class _Database(RDBStorage):
    """Records a trial once, however often that is tried.

    A try that failed may have been recorded all the same, or still be under way. Optuna's own method tries
    five times, and gives each the next number.
    """

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        if template_trial is None:
            return super().create_new_trial(study_id)
        from optuna.storages._rdb.models import StudyModel, TrialModel
        from optuna.storages._rdb.storage import _create_scoped_session

        with _create_scoped_session(self.scoped_session) as session:
            StudyModel.find_or_raise_by_id(study_id, session, for_update=True)  # waits for a try under way
            same = session.query(TrialModel).filter_by(study_id=study_id, number=template_trial.number)
            trial = same.one_or_none() or self._get_prepared_new_trial(study_id, template_trial, session)
            return int(trial.trial_id)


@contextlib.contextmanager
def answering(place: Place) -> Iterator[None]:
    """Within, a database that does not answer (any more) is an InputError."""
    if place.url is None:
        yield
        return
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise unreachable(place.url, error) from None


def searches_in(storage: BaseStorage) -> list[tuple[Identity, FrozenStudy]]:
    """Every revision that is whole."""
    studies = [study for study in storage.get_all_studies() if SEARCH in study.user_attrs]
    return [(Identity(**study.user_attrs[SEARCH]), study) for study in studies]


def recorded(place: Place) -> tuple[str, list[TrialRecord]]:
    """What a ledger says now: the text of the space, empty where that is not known, and the trials."""
    storage = open_storage(place)
    study = newest_study(place, storage)
    if study is None:
        return "", []
    identity = study.user_attrs.get(SEARCH, {})
    trials = storage.get_all_trials(study._study_id, deepcopy=False)
    return identity.get("space", ""), [record_of(trial) for trial in trials]


def newest_study(place: Place, storage: BaseStorage) -> FrozenStudy | None:
    """The study that counts for `place`; None if there is none yet.

    A journal with one study that says nothing of itself is of an earlier version, or was just begun.
    """
    found = searches_in(storage)
    if place.url is not None:
        found = [(identity, study) for identity, study in found if identity.uid == place.uid]
    if found:
        return max(found, key=lambda each: each[0].revision)[1]
    studies = [] if place.url is not None else storage.get_all_studies()
    if len(studies) > 1:
        raise InputError(
            f"holds {len(studies)} studies", file=place.journal, allowed="the ledger of one search"
        )
    return studies[0] if studies else None
