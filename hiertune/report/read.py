"""What a search's folder says, whether the search is finished, running or broken off."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hiertune._database import Place, ledger_url, place_of
from hiertune._summary import read_summary
from hiertune._text import without_passwords
from hiertune._yaml import parse_yaml
from hiertune.errors import InputError
from hiertune.record import (
    OUTSIDE,
    PARAM,
    SEARCH,
    Identity,
    answering,
    newest_study,
    open_storage,
    record_of,
    row_of,
)

LEAST_FOR_IMPORTANCE = 10  # completed trials; of fewer, importance is noise


@dataclass(frozen=True)
class Search:
    """One search, as its folder has it now."""

    name: str
    metric: str
    mode: str
    """max or min."""
    trials: pd.DataFrame
    """Rows by number: trial, state, reason, epochs, seconds, objective, `param/<key path>`, metrics."""
    curves: pd.DataFrame
    """trial, epoch, value: the objective metric after every epoch."""
    importance: Mapping[str, float]
    """Share of each parameter in how much the objective varies; empty if it can't be told."""
    summary: Mapping[str, Any] | None
    """summary.json; None unless it covers all trials, that is, the search is finished."""
    space: str
    """The space file as given, without passwords."""

    @property
    def params(self) -> list[str]:
        """Key paths of the searched parameters."""
        return [column.removeprefix(PARAM) for column in self.trials.columns if column.startswith(PARAM)]

    @property
    def ranked(self) -> pd.DataFrame:
        """Trials with an objective, best first: completed ones, then those that were stopped early."""
        known = self.trials[
            self.trials["objective"].notna() & ~self.trials["state"].isin(["failed", "outside"])
        ]
        order = known.assign(_stopped=known["state"] != "completed", _value=self.sign * known["objective"])
        order = order.sort_values(["_stopped", "_value", "trial"], ascending=[True, False, True])
        return order.drop(columns=["_stopped", "_value"])

    @property
    def best(self) -> int | None:
        """The trial that leads."""
        ranked = self.ranked
        completed = ranked[ranked["state"] == "completed"]
        return None if completed.empty else int(completed["trial"].iloc[0])

    @property
    def sign(self) -> int:
        return 1 if self.mode == "max" else -1


def read_search(run_dir: Path) -> Search:
    """Raises InputError if `run_dir` is no search's folder, or a file in it is damaged."""
    kept = ("ledger.log", "ledger.json", "trials.csv")
    if not any((run_dir / name).exists() for name in kept):
        raise InputError("is not the folder of a search", file=run_dir, allowed="runs/NAME")
    path = run_dir / "space.yaml"
    with _reading(path):
        space = path.read_text("utf-8") if path.exists() else ""
    record = _read_ledger(run_dir, space)
    with _reading(run_dir / "trials.csv"):
        trials = _read_trials(run_dir / "trials.csv")
    if record is None and len(trials) and (run_dir / "ledger.log").exists():
        raise InputError(
            "holds no search, and trials.csv has one", file=run_dir / "ledger.log", allowed="its journal"
        )
    with _reading(run_dir / "ledger.log"):
        if record is not None and (len(record.trials) > len(trials) or record.is_revised(trials)):
            trials = _trials_of(record.trials)  # the table is written when a search ends
        importance = {} if record is None else _importance(record)
    summary_file = run_dir / "summary.json"
    summary = read_summary(summary_file) if summary_file.exists() else None
    if summary is not None and summary["trials"] != trials["state"].value_counts().to_dict():
        summary = None  # of an earlier end of a search that goes on
    metric, mode = _objective(record, trials, summary)
    with _reading(run_dir / "curves.csv"):
        curves = _read_curves(run_dir / "curves.csv", metric)
    return Search(
        name=run_dir.resolve().name,
        metric=metric,
        mode=mode,
        trials=trials,
        curves=curves,
        importance=importance,
        summary=summary,
        space=without_passwords(space),
    )


def _objective(
    record: _Record | None, trials: pd.DataFrame, summary: Mapping[str, Any] | None
) -> tuple[str, str]:
    """Metric and mode."""
    if summary is not None:
        return summary["objective"]["metric"], summary["objective"]["mode"]
    if record is not None and record.identity is not None and record.identity.metric:
        return record.identity.metric, record.identity.mode
    minimised = record is not None and record.direction == StudyDirection.MINIMIZE
    return _objective_metric(trials), "min" if minimised else "max"


def _read_trials(path: Path) -> pd.DataFrame:
    if not path.exists():
        return _table([])
    try:
        # Only an empty cell is a missing value: a parameter may well be called "None".
        table = pd.read_csv(path, keep_default_na=False, na_values=[""])
    except ValueError as error:  # pandas' parser errors too
        raise InputError(f"can't be read: {error}", file=path) from error
    missing = [column for column in ("trial", "state", "objective") if column not in table]
    if missing:
        raise InputError(f"lacks the columns {', '.join(missing)}", file=path)
    return _table(table)


def _table(rows: pd.DataFrame | list[dict[str, Any]]) -> pd.DataFrame:
    table = pd.DataFrame(rows)
    for column in ("trial", "state", "reason", "epochs", "seconds", "objective"):
        if column not in table:
            table[column] = pd.Series(dtype=object)
    for column in ("epochs", "seconds", "objective"):
        table[column] = pd.to_numeric(table[column]).replace([math.inf, -math.inf], math.nan)
    return table.astype({"trial": int}).sort_values("trial", ignore_index=True)


def _read_ledger(run_dir: Path, space: str) -> _Record | None:
    """What the journal or the database of a search says; None where there is neither.

    A last line that is being written, or that a crash cut short, is as if it were not there.
    """
    journal = run_dir / "ledger.log"
    if not journal.exists() and not Place(journal).pointer.exists():
        return None
    setting = None if journal.exists() else _ledger_setting(space)
    place = place_of(journal, None if journal.exists() else ledger_url(setting))
    with answering(place):
        storage = open_storage(place)
        study = newest_study(place, storage)
        if study is None:
            return None
        trials = storage.get_all_trials(study._study_id, deepcopy=False)
    identity = Identity(**study.user_attrs[SEARCH]) if SEARCH in study.user_attrs else None
    return _Record(identity, study.direction, trials)


@dataclass(frozen=True)
class _Record:
    """A ledger as it is now."""

    identity: Identity | None
    direction: StudyDirection
    trials: list[FrozenTrial]

    def is_revised(self, table: pd.DataFrame) -> bool:
        """Whether trials were left outside since the table was written."""
        outside = sum(OUTSIDE in trial.user_attrs for trial in self.trials)
        return outside != (table["state"] == "outside").sum()


def _ledger_setting(space: str) -> str | None:
    """`ledger:` of a space file that may no longer be valid in other ways."""
    try:
        node = parse_yaml(space).value.get("ledger")
    except InputError:
        return None
    return node.value if node is not None and isinstance(node.value, str) else None


def _trials_of(trials: list[FrozenTrial]) -> pd.DataFrame:
    return _table([row_of(record) for record in map(record_of, trials)])


def _objective_metric(trials: pd.DataFrame) -> str:
    """The metric whose values are the objective's; ledgers of earlier versions don't name it."""
    completed = trials[trials["state"] == "completed"]
    metrics = [column for column in trials.columns if column.startswith("val/")]
    same = [name for name in metrics if len(completed) and (completed[name] == completed["objective"]).all()]
    return same[-1] if same else "objective"


def _read_curves(path: Path, metric: str) -> pd.DataFrame:
    empty = pd.DataFrame({"trial": [], "epoch": [], "value": []})
    if not path.exists() or path.stat().st_size == 0:
        return empty
    with pd.read_csv(path, chunksize=200_000, on_bad_lines="skip") as file:  # a last line may be half written
        parts = [part.loc[part["metric"] == metric, ["trial", "epoch", "value"]] for part in file]
    curves = pd.concat([empty, *parts]).apply(pd.to_numeric, errors="coerce")
    curves = curves.replace([math.inf, -math.inf], math.nan).dropna()
    # A trial that went on from its checkpoint has told an epoch twice.
    return curves.drop_duplicates(["trial", "epoch"], keep="last").sort_values(["trial", "epoch"])


_DAMAGE = (  # the last is what Optuna's journal raises for an operation that it doesn't know
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    OverflowError,
    AssertionError,
)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What a damaged file makes its reader raise, as an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except _DAMAGE as error:
        text = " ".join(str(error).split())[:300]
        raise InputError(f"can't be read: {text}", file=path) from error


def _importance(record: _Record) -> dict[str, float]:
    completed = [trial for trial in record.trials if trial.state == TrialState.COMPLETE]
    if len(completed) < LEAST_FOR_IMPORTANCE or len({trial.value for trial in completed}) == 1:
        return {}
    if not any(len({str(trial.params.get(name)) for trial in completed}) > 1 for name in completed[0].params):
        return {}
    study = optuna.create_study(direction=record.direction)
    study.add_trials(completed)
    return optuna.importance.get_param_importances(study)
