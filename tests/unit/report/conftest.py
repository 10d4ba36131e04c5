"""Folders as searches leave them, made without training anything."""

import csv
import json
import math
import shutil
from pathlib import Path

import optuna
import pandas as pd
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

LEVELS = ("domain", "phylum", "class", "order", "family", "genus")
SPACE = """\
name: demo
data: {path: builtin:rrna16s}
model:
  head:
    choice:
      - {kind: linear}
      - {kind: conditional, temperature: {loguniform: [0.2, 5.0]}}
optimizer: {lr: {loguniform: [1e-4, 1e-1]}}
tracking: {uri: "postgresql://me:s3cret@host/db"}
"""


def metrics_at(value, split="val"):
    """Metrics of a method that gets `value` of the finest level right."""
    shares = {f"{split}/accuracy/{level}": 1 - (1 - value) * (k + 1) / 6 for k, level in enumerate(LEVELS)}
    return {**shares, f"{split}/loss": 1.0 - value, f"{split}/hierarchical_distance": 4 - 2 * value}


def suggest(trial):
    head = trial.suggest_categorical("model.head", ["linear", "conditional"])
    if head == "conditional":
        trial.suggest_float("model.head.temperature", 0.2, 5.0, log=True)
    trial.suggest_float("optimizer.lr", 1e-4, 1e-1, log=True)
    trial.suggest_float("loss.alpha", 0.0, 0.4)
    trial.suggest_categorical("model.backbone.hidden", ["[256]", "[512]"])


def skill(params):
    """The value that training would reach."""
    lr = math.exp(-((math.log10(params["optimizer.lr"]) + 2) ** 2))
    head = 0.03 if params["model.head"] == "conditional" else 0.0
    return round(0.55 + 0.37 * lr + head - 0.1 * params["loss.alpha"], 6)


class Builder:
    """Writes a run folder trial by trial, as a search does."""

    def __init__(self, root, mode="max"):
        root.mkdir(parents=True)
        self.root = root
        (root / "space.yaml").write_text(SPACE)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = JournalStorage(JournalFileBackend(str(root / "ledger.log")))
        direction = "maximize" if mode == "max" else "minimize"
        sampler = optuna.samplers.RandomSampler(seed=1)
        self.mode = mode
        self.study = optuna.create_study(
            storage=storage, study_name=root.name, direction=direction, sampler=sampler
        )
        self.curves = [("trial", "epoch", "metric", "value")]

    def add(self, state="completed", epochs=8, reason=None):
        trial = self.study.ask()
        suggest(trial)
        value = skill(trial.params) if self.mode == "max" else 1 - skill(trial.params)
        metric = "val/accuracy/genus" if self.mode == "max" else "val/loss"
        for epoch in range(1, epochs + 1):
            reached = value * (1 - 0.6 * math.exp(-0.7 * epoch)) if epoch < 8 else value
            trial.report(reached, epoch)
            self.curves += [(trial.number, epoch, metric, reached), (trial.number, epoch, "val/other", 9.9)]
        if state == "running":
            return
        metrics = metrics_at(value if self.mode == "max" else 1 - value)
        for key, attribute in {"epochs": epochs, "seconds": 1.5 * epochs, "metrics": metrics}.items():
            trial.set_user_attr(key, attribute)
        trial.set_user_attr("reason", reason)
        told = {"completed": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
        self.study.tell(trial, value if state == "completed" else None, state=told[state])

    def write_curves(self):
        with (self.root / "curves.csv").open("w", newline="") as file:
            csv.writer(file).writerows(self.curves)

    def finish(self, controls=True, drop_ledger=False):
        """What a search writes at its end."""
        self.write_curves()
        rows = []
        for trial in self.study.trials:
            steps = trial.intermediate_values
            state = {"COMPLETE": "completed", "PRUNED": "pruned", "FAIL": "failed"}[trial.state.name]
            attributes = trial.user_attrs
            value = trial.value if state == "completed" else steps.get(max(steps, default=0))
            row = {"trial": trial.number, "state": state, "reason": attributes["reason"]}
            row |= {"epochs": attributes["epochs"], "seconds": attributes["seconds"], "objective": value}
            row |= {f"param/{name}": param for name, param in trial.params.items()}
            rows.append(row | attributes["metrics"])
        pd.DataFrame(rows).to_csv(self.root / "trials.csv", index=False)
        (self.root / "summary.json").write_text(json.dumps(self.summary(rows, controls)))
        if drop_ledger:
            (self.root / "ledger.log").unlink()
        return self.root

    def summary(self, rows, controls):
        best = self.study.best_trial
        winner = {**best.user_attrs["metrics"], **metrics_at(0.958, "test")}
        against = {"rows": 523, "difference": 0.021, "low": 0.004, "high": 0.038, "p_value": 0.013}
        chance = {"rows": 523, "difference": -0.002, "low": -0.02, "high": 0.016, "p_value": 0.9}
        both = {
            "flat": {"metrics": metrics_at(0.937, "test"), "against_winner": against},
            "nearest_neighbour": {"metrics": metrics_at(0.96, "test"), "against_winner": chance},
        }
        states = [row["state"] for row in rows]
        metric = "val/accuracy/genus" if self.mode == "max" else "val/loss"
        return {
            "name": self.root.name,
            "objective": {"metric": metric, "mode": self.mode, "value": best.value},
            "trials": {state: states.count(state) for state in set(states)},
            "winner": {"trial": best.number, "params": best.params, "metrics": winner},
            "controls": both if controls else {},
            "refit": True,
            "seconds": 271.4,
            "seed": 7,
            "versions": {"python": "3.11.2", "torch": "2.14.1"},
            "data": {"path": "builtin:rrna16s", "fingerprint": "0123456789abcdef" * 4, "rows": 2602},
            "tracking": {"uri": "sqlite:////runs/mlflow.db", "delivered": 90, "total": 100},
        }


@pytest.fixture
def builder(tmp_path):
    return Builder(tmp_path / "demo")


@pytest.fixture(scope="session")
def example(tmp_path_factory):
    """24 trials of all kinds, ended."""
    builder = Builder(tmp_path_factory.mktemp("runs") / "demo")
    for number in range(24):
        if number in (4, 9):
            builder.add("failed", epochs=number // 3, reason=f"loss is nan at epoch {number // 3 + 1}")
        elif number % 3 == 2:
            builder.add("pruned", epochs=2, reason="stopped by asha at epoch 2")
        else:
            builder.add()
    builder.finish()
    return builder


@pytest.fixture
def finished(tmp_path, example):
    """A copy of the example's folder, to be changed at will."""
    return Path(shutil.copytree(example.root, tmp_path / "runs" / "demo"))
