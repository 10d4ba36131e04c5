"""The plain way to search: a TorchTrainer started inside a Tune function, as Ray's own guide shows.

https://docs.ray.io/en/latest/train/user-guides/hyperparameter-optimization.html. The workers train
by the same `run_trial` on the same data, so that only what surrounds a trial differs. Ray runs with its
own defaults here, not with those that hiertune sets for its searches.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import ray
import ray.train
from ray import tune
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from hiertune.config import TrialConfig
from hiertune.data import open_dataset
from hiertune.search import cluster
from hiertune.train.loop import run_trial
from hiertune.train.result import Decision, EpochResult


@dataclass(frozen=True)
class PlainTrial:
    config: TrialConfig
    epochs: int
    """After so many epochs it is stopped, as it was in the search that it is compared with."""


def seconds_of_plain_trials(trials: list[PlainTrial], workers: int, storage: str) -> list[float]:
    """Wall seconds from the start of each trial to the start of the next, one after another."""
    starts: list[float] = []

    class Clock(tune.Callback):
        def setup(self, *args, **kwargs) -> None:
            starts.append(time.perf_counter())

        def on_trial_complete(self, iteration, trials, trial, **info) -> None:
            starts.append(time.perf_counter())

        def __getstate__(self) -> dict:  # for Tune's snapshot
            return {}

    with _ray_as_it_comes():
        _tuner(trials, workers, storage, Clock()).fit()
    return [later - earlier for earlier, later in itertools.pairwise(starts)]


@contextlib.contextmanager
def _ray_as_it_comes() -> Iterator[None]:
    """A Ray of this machine without hiertune's settings; but for Train V2, which the guide is written for."""
    ours = {name: os.environ.pop(name) for name in cluster.ENVIRONMENT if name in os.environ}
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    ray.init(log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()
        os.environ.update(ours)


def _tuner(trials: list[PlainTrial], workers: int, storage: str, clock: tune.Callback) -> tune.Tuner:
    return tune.Tuner(
        # Without this a trial asks for a CPU of its own, and on a small machine its workers never fit.
        tune.with_resources(_driver, tune.PlacementGroupFactory([{"memory": 1}])),
        param_space={"trial": tune.grid_search(trials), "workers": workers, "storage": storage},
        tune_config=tune.TuneConfig(max_concurrent_trials=1),
        run_config=tune.RunConfig(name="plain", storage_path=storage, verbose=0, callbacks=[clock]),
    )


def _driver(config: dict) -> None:
    TorchTrainer(
        _worker,
        train_loop_config={"trial": config["trial"]},
        scaling_config=ScalingConfig(num_workers=config["workers"], resources_per_worker={"CPU": 1}),
        run_config=RunConfig(
            name=f"train-{tune.get_context().get_trial_id()}",
            storage_path=config["storage"],
            callbacks=[TuneReportCallback()],
        ),
    ).fit()


def _worker(config: dict) -> None:
    trial: PlainTrial = config["trial"]

    def report(result: EpochResult) -> Decision:
        ray.train.report(result.metrics)
        return Decision.STOP if result.epoch >= trial.epochs else Decision.CONTINUE

    run_trial(trial.config, open_dataset(trial.config.data), report)
