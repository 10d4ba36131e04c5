"""What a search's folder says, whether the search is finished, running or broken off."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from hiertune._text import without_passwords
from hiertune.errors import InputError

PARAM = "param/"
LEAST_FOR_IMPORTANCE = 10  # completed trials; of fewer, importance is noise

_STATES = {
    TrialState.COMPLETE: "completed",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "running",
}


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
        known = self.trials[self.trials["objective"].notna() & (self.trials["state"] != "failed")]
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
    if not (run_dir / "ledger.log").exists() and not (run_dir / "trials.csv").exists():
        raise InputError("is not the folder of a search", file=run_dir, allowed="runs/NAME")
    study = _read_ledger(run_dir / "ledger.log")
    trials = _read_trials(run_dir / "trials.csv")
    if study is not None and len(study.get_trials(deepcopy=False)) > len(trials):
        trials = _trials_of(study)  # the table is written when a search ends
    summary = _read_summary(run_dir / "summary.json")
    if summary is not None and sum(summary["trials"].values()) != len(trials):
        summary = None  # of an earlier end of a search that goes on
    if summary is not None:
        metric, mode = summary["objective"]["metric"], summary["objective"]["mode"]
    else:
        minimised = study is not None and study.direction == optuna.study.StudyDirection.MINIMIZE
        metric, mode = _objective_metric(trials), "min" if minimised else "max"
    space = run_dir / "space.yaml"
    return Search(
        name=run_dir.resolve().name,
        metric=metric,
        mode=mode,
        trials=trials,
        curves=_read_curves(run_dir / "curves.csv", metric),
        importance={} if study is None else _importance(study),
        summary=summary,
        space=without_passwords(space.read_text("utf-8")) if space.exists() else "",
    )


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


def _read_ledger(path: Path) -> optuna.Study | None:
    if not path.exists():
        return None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        storage = JournalStorage(JournalFileBackend(str(path)))
        studies = storage.get_all_studies()
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"can't be read: {error}", file=path, allowed="an Optuna journal") from error
    if len(studies) != 1:
        raise InputError(f"holds {len(studies)} studies", file=path, allowed="the ledger of one search")
    return optuna.load_study(study_name=studies[0].study_name, storage=storage)


def _trials_of(study: optuna.Study) -> pd.DataFrame:
    rows = []
    for trial in study.get_trials(deepcopy=False):
        steps = trial.intermediate_values
        attributes = trial.user_attrs
        rows.append(
            {
                "trial": trial.number,
                "state": _STATES[trial.state],
                "reason": attributes.get("reason"),
                "epochs": attributes.get("epochs", max(steps, default=0)),
                "seconds": attributes.get("seconds"),
                "objective": trial.value if trial.value is not None else steps.get(max(steps, default=0)),
                **{PARAM + name: value for name, value in trial.params.items()},
                **attributes.get("metrics", {}),
            }
        )
    return _table(rows)


def _objective_metric(trials: pd.DataFrame) -> str:
    """The metric whose values are the objective's; the ledger of a running search doesn't name it."""
    completed = trials[trials["state"] == "completed"]
    metrics = [column for column in trials.columns if column.startswith("val/")]
    same = [name for name in metrics if len(completed) and (completed[name] == completed["objective"]).all()]
    return same[-1] if same else "objective"


def _read_curves(path: Path, metric: str) -> pd.DataFrame:
    empty = pd.DataFrame({"trial": [], "epoch": [], "value": []})
    if not path.exists() or path.stat().st_size == 0:
        return empty
    parts = [empty]
    for part in pd.read_csv(path, chunksize=200_000, on_bad_lines="skip"):  # a last line may be half written
        parts.append(part.loc[part["metric"] == metric, ["trial", "epoch", "value"]])
    curves = pd.concat(parts).apply(pd.to_numeric, errors="coerce").replace([math.inf, -math.inf], math.nan)
    curves = curves.dropna()
    # A trial that went on from its checkpoint has told an epoch twice.
    return curves.drop_duplicates(["trial", "epoch"], keep="last").sort_values(["trial", "epoch"])


def _read_summary(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"can't be read: {error}", file=path) from error


def _importance(study: optuna.Study) -> dict[str, float]:
    completed = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(completed) < LEAST_FOR_IMPORTANCE or len({trial.value for trial in completed}) == 1:
        return {}
    if not any(len({str(trial.params.get(name)) for trial in completed}) > 1 for name in completed[0].params):
        return {}
    return optuna.importance.get_param_importances(study)
