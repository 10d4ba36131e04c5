"""The record of a search as anyone may read it: what became of every trial, in Optuna's storage.

Read by the report, written by `hiertune.search.ledger`. A ledger holds a study for every revision of the
space: a study can't change its choices, so a changed space begins a new one, into which the trials are
copied. The newest that was copied whole counts.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.storages import BaseStorage, RDBStorage
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from hiertune._database import connect_arguments, display_ledger, unreachable
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
"""Trial attribute of those outside: `state` and `params` before, `reason`, `revision`."""

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


# ------------------------------------------------------------------------------------- where it is


@dataclass(frozen=True)
class Place:
    """Where the ledger of a run folder is: its journal, or a database."""

    journal: Path
    """The file, if it is no database."""
    url: str | None = field(default=None, repr=False)
    """Of a database; may hold a password."""

    @property
    def pointer(self) -> Path:
        """File that says which search of a database is this folder's."""
        return self.journal.with_suffix(".json")

    def __str__(self) -> str:
        return str(self.journal) if self.url is None else display_ledger(self.url)

    @property
    def uid(self) -> str | None:
        """Of the search that the pointer names."""
        return None if (pointer := _read_pointer(self.pointer)) is None else pointer["uid"]

    def point(self, uid: str) -> None:
        """Write the pointer, once the search is in the database."""
        assert self.url is not None
        text = json.dumps({"ledger": display_ledger(self.url), "uid": uid}, indent=2)
        temporary = self.pointer.with_suffix(".tmp")
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(self.pointer)


def place_of(journal: Path, url: str | None, *, given: bool = False) -> Place:
    """The ledger of a run folder that is there. `url` is the database that is set, if any.

    A folder with a journal keeps to it; one that was begun on a database needs its address.

    Args:
        given: `url` stands in the space file, not in the environment: then it must not differ.
    """
    place = Place(journal, url)
    if journal.exists():
        if url is not None and given:
            raise InputError(
                f"{display_ledger(url)!r} is not the ledger of this search: that is {place.journal}",
                key="ledger",
                allowed="the setting that it was begun with, or another name",
            )
        return Place(journal)
    if url is None and (pointer := _read_pointer(place.pointer)) is not None:
        raise InputError(
            f"the ledger of this search is the database {pointer['ledger']}",
            file=place.pointer,
            allowed="its address as `ledger:` in the space file, or in HIERTUNE_LEDGER",
        )
    return place


def _read_pointer(path: Path) -> dict[str, str] | None:
    try:
        pointer = json.loads(path.read_text("utf-8"))
        return {key: str(pointer[key]) for key in ("ledger", "uid")}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"is damaged ({type(error).__name__})", file=path) from None


# ------------------------------------------------------------------------------------- reading


def open_storage(place: Place, *, writable: bool = False) -> BaseStorage:
    """InputError where the file is damaged or the database doesn't answer."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if place.url is None:
        return open_journal(place.journal, writable=writable)
    from sqlalchemy.exc import SQLAlchemyError

    try:
        # Without Optuna's cache in between: what is read once is read fresh, and the writer remembers.
        return RDBStorage(place.url.replace("{", "{{").replace("}", "}}"), connect_arguments(place.url))
    except (SQLAlchemyError, RuntimeError, optuna.exceptions.StorageInternalError) as error:
        raise unreachable(place.url, error) from None


def searches_in(storage: BaseStorage) -> list[tuple[Identity, FrozenStudy]]:
    """Every revision that is whole."""
    studies = [study for study in storage.get_all_studies() if SEARCH in study.user_attrs]
    return [(Identity(**study.user_attrs[SEARCH]), study) for study in studies]


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
