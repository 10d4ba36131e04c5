"""Whether all that a search left behind tells one story: ledger, trials.csv, curves.csv, MLflow.

Each source is read by its own library, not by hiertune's code: a mistake in a reader must not hide itself.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import optuna
import pandas as pd
from mlflow import MlflowClient
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

ENDED = {TrialState.COMPLETE: "completed", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
_TIMES = ("epoch_seconds", "input_seconds")
_SET_STATE, _RUNNING = 6, 0  # of Optuna's journal: an operation and a state


@dataclass
class Audit:
    """What was counted, and every disagreement in words."""

    trials: int = 0
    completed: int = 0
    pruned: int = 0
    failed: int = 0
    told_twice: int = 0
    epochs: int = 0
    """Epochs of all trials, each counted once."""
    trained_again: int = 0
    """Epochs that curves.csv has more than once: trained again after a kill."""
    points: int = 0
    """Metric values in MLflow."""
    problems: list[str] = field(default_factory=list)

    def expect(self, condition: bool, problem: str) -> None:
        if not condition:
            self.problems.append(problem)


def audit(run: Path, metric: str, store: str) -> Audit:
    """Compare the sources of the finished search in `run`, whose objective is `metric`.

    `store`: MLflow's tracking URI.
    """
    study = newest_study(run / "ledger.log")
    table = pd.read_csv(run / "trials.csv").set_index("trial")
    curves = pd.read_csv(run / "curves.csv")
    result = Audit(trials=len(study.trials))
    states = Counter(ENDED.get(trial.state, "open") for trial in study.trials)
    result.completed, result.pruned, result.failed = (
        states[name] for name in ("completed", "pruned", "failed")
    )
    result.expect(states["open"] == 0, f"{states['open']} trials are still open in the ledger")
    result.expect(len(table) == len(study.trials), f"trials.csv has {len(table)} rows")
    result.told_twice = sum(count - 1 for count in _times_told(run / "ledger.log").values())
    result.expect(result.told_twice == 0, f"{result.told_twice} trials were told twice")
    _compare_with_curves(result, study, curves, metric)
    _compare_with_table(result, study, table)
    _compare_with_mlflow(result, study, curves, run.name, store)
    return result


def newest_study(journal: Path) -> optuna.Study:
    """The study that counts: a changed space makes a new one."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(journal)))
    newest = storage.get_all_studies()[-1]
    return optuna.load_study(study_name=newest.study_name, storage=storage)


def _times_told(journal: Path) -> Counter[int]:
    """How often each trial got a final state, from the journal's own lines."""
    told: Counter[int] = Counter()
    for line in journal.read_text("utf-8").splitlines():
        entry = json.loads(line)
        if entry["op_code"] == _SET_STATE and entry["state"] != _RUNNING:
            told[entry["trial_id"]] += 1
    return told


def _compare_with_table(result: Audit, study: optuna.Study, table: pd.DataFrame) -> None:
    for trial in study.trials:
        if trial.number not in table.index:
            result.problems.append(f"trial {trial.number} is not in trials.csv")
            continue
        row = table.loc[trial.number]
        name = f"trial {trial.number}: trials.csv"
        result.expect(row["state"] == ENDED.get(trial.state), f"{name} has state {row['state']}")
        for key, value in trial.params.items():
            told = row[f"param/{key}"]
            same = told == value or str(told) == str(value)
            result.expect(same, f"{name} has {key} = {told}, not {value}")
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
            result.expect(
                row["objective"] == trial.value, f"{name} has {row['objective']}, not {trial.value}"
            )
            last = max(trial.intermediate_values)
            result.expect(row["epochs"] == last, f"{name} has {row['epochs']} epochs, not {last}")


def _compare_with_curves(result: Audit, study: optuna.Study, curves: pd.DataFrame, metric: str) -> None:
    objective = curves[curves["metric"] == metric]
    for number, group in objective.groupby("trial"):
        seen: defaultdict[int, set[float]] = defaultdict(set)
        for epoch, value in zip(group["epoch"], group["value"], strict=True):
            seen[int(epoch)].add(float(value))
        result.epochs += len(seen)
        result.trained_again += len(group) - len(seen)
        told = {step: {value} for step, value in study.trials[int(number)].intermediate_values.items()}
        result.expect(dict(seen) == told, f"trial {number}: curves.csv and the ledger differ")
        result.expect(sorted(seen) == list(range(1, len(seen) + 1)), f"trial {number}: epochs are missing")


def _compare_with_mlflow(
    result: Audit, study: optuna.Study, curves: pd.DataFrame, name: str, store: str
) -> None:
    client = MlflowClient(store)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`hiertune.search` = '{name}'", max_results=50_000)
    parents = [run for run in found if run.data.tags["hiertune.kind"] == "search"]
    children = [run for run in found if run.data.tags["hiertune.kind"] == "trial"]
    result.expect(len(parents) == 1, f"MLflow has {len(parents)} runs of the search")
    result.expect(len(children) == len(study.trials), f"MLflow has {len(children)} runs of trials")
    wanted = _points(curves)
    for run in children:
        number = int(run.data.tags["hiertune.trial"])
        state = ENDED.get(study.trials[number].state)
        told = run.data.tags.get("hiertune.state")
        result.expect(told == state, f"trial {number}: MLflow has state {told}, not {state}")
        given: Counter[tuple[str, int, float]] = Counter()
        for key in run.data.metrics:
            history = client.get_metric_history(run.info.run_id, key)
            given.update((key, point.step, point.value) for point in history)
        result.points += given.total()
        given = Counter({point: count for point, count in given.items() if point[0] not in _TIMES})
        doubled = sum(count - 1 for count in given.values())
        result.expect(doubled == 0, f"trial {number}: {doubled} points are doubled in MLflow")
        missing, strange = wanted[number] - set(given), set(given) - wanted[number]
        result.expect(
            not missing, f"trial {number}: {len(missing)} points are not in MLflow: {_few(missing)}"
        )
        result.expect(not strange, f"trial {number}: {len(strange)} points in MLflow alone: {_few(strange)}")


def _points(curves: pd.DataFrame) -> defaultdict[int, set[tuple[str, int, float]]]:
    """What MLflow should have of each trial, but for how long an epoch took: that differs each time."""
    points: defaultdict[int, set[tuple[str, int, float]]] = defaultdict(set)
    for trial, epoch, metric, value in curves[~curves["metric"].isin(_TIMES)].itertuples(index=False):
        points[trial].add((metric, int(epoch), float(value)))
    return points


def _few(points: set) -> str:
    return ", ".join(map(str, sorted(points)[:3]))
