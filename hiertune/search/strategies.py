"""Samplers and schedulers by config: which settings to try next, which trials to stop early."""

from __future__ import annotations

import heapq
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import optuna
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)

from hiertune.config import (
    ASHAConfig,
    CMAESConfig,
    GPConfig,
    GridConfig,
    HyperbandConfig,
    MedianConfig,
    NoSchedulerConfig,
    QMCConfig,
    RandomConfig,
    SamplerConfig,
    SchedulerConfig,
    TPEConfig,
)


class _Grid(optuna.samplers.BruteForceSampler):
    """Every combination once, conditional branches included. The search knows how many there are."""

    def after_trial(self, study, trial, state, values) -> None:
        """Optuna's would call `study.stop`, which ask and tell do not have."""


class _TPE(optuna.samplers.TPESampler):
    """Optuna's looks at every trial for every new one: at 10,000 trials that takes half a second.

    Its model of good settings is made of the best 25 trials, so that stays what it is; its model of the
    others weighs old ones less anyway.
    """

    def __init__(self, considered: int, **options: Any) -> None:
        super().__init__(**options)
        self._considered = considered

    def infer_relative_search_space(self, study, trial):
        return super().infer_relative_search_space(_excerpt(study, self._considered), trial)

    def sample_relative(self, study, trial, search_space):
        return super().sample_relative(_excerpt(study, self._considered), trial, search_space)

    def sample_independent(self, study, trial, param_name, param_distribution):
        excerpt = _excerpt(study, self._considered)
        return super().sample_independent(excerpt, trial, param_name, param_distribution)


class _Excerpt:
    """A study as `_TPE` sees it: without the trials that it doesn't consider."""

    _BEST = 25  # as many as the default `gamma` of Optuna's takes for good ones

    def __init__(self, study: optuna.Study, newest: int) -> None:
        self._study = study
        trials = study.get_trials(deepcopy=False)
        ended = [trial.number for trial in trials if trial.state.is_finished()]
        completed = [
            trial for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE and trial.values
        ]
        sign = -1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
        best = heapq.nsmallest(self._BEST, completed, key=lambda trial: sign * trial.values[0])
        left_out = set(ended[:-newest]) - {trial.number for trial in best}
        self._trials = [trial for trial in trials if trial.number not in left_out]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def _get_trials(self, deepcopy=True, states=None, use_cache=False) -> list[optuna.trial.FrozenTrial]:
        return [trial for trial in self._trials if states is None or trial.state in states]


def _excerpt(study: optuna.Study, newest: int) -> optuna.Study:
    return cast(optuna.Study, _Excerpt(study, newest))


def build_sampler(config: SamplerConfig, seed: int) -> optuna.samplers.BaseSampler:
    """An Optuna sampler. `seed` decides every draw as long as trials are asked one after another."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # `group` has been for years
        return _sampler(config, seed)


def _sampler(config: SamplerConfig, seed: int) -> optuna.samplers.BaseSampler:
    match config:
        case TPEConfig():
            # Without multivariate and group, Optuna samples conditional parameters one by one, silently.
            return _TPE(
                config.considered_trials,
                seed=seed,
                n_startup_trials=config.startup_trials,
                multivariate=True,
                group=True,
                constant_liar=True,
            )
        case RandomConfig():
            return optuna.samplers.RandomSampler(seed=seed)
        case GridConfig():
            return _Grid(seed=seed)
        case GPConfig():
            return optuna.samplers.GPSampler(
                seed=seed, n_startup_trials=config.startup_trials, warn_independent_sampling=False
            )
        case CMAESConfig():
            return optuna.samplers.CmaEsSampler(
                seed=seed, n_startup_trials=config.startup_trials, warn_independent_sampling=False
            )
        case QMCConfig():
            return optuna.samplers.QMCSampler(
                seed=seed, qmc_type=config.sequence, scramble=True, warn_independent_sampling=False
            )
    raise AssertionError(config)


@dataclass(frozen=True)
class Memory:
    """What a resumed search has measured: the objective by epoch, by the id of the trial's job."""

    ended: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    running: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    """Of trials that go on."""


@dataclass(frozen=True)
class _Ended:
    """Stands for a trial of an earlier session before a Tune scheduler."""

    trial_id: str


class _Remembers(TrialScheduler):
    """Mixed into a Tune scheduler: before its first trial it is told what the ledger holds.

    Trials that have ended stand there under the ids of their jobs. One that goes on comes with a new id from
    Tune, and its epochs are told under that one as it is added, so it is counted once. Nothing is decided
    on them: that was done then.
    """

    memory = Memory()
    _told = False

    def on_trial_add(self, tune_controller, trial) -> None:
        if not self._told:
            self._told = True
            for job_id, epochs in self.memory.ended.items():
                ended = _Ended(job_id)
                super().on_trial_add(tune_controller, ended)  # type: ignore[arg-type]
                self._tell(ended, epochs)
        super().on_trial_add(tune_controller, trial)
        job = trial.config.get("job")
        if job is not None:
            self._tell(trial, self.memory.running.get(job.id, {}))

    def _tell(self, trial, epochs: Mapping[int, float]) -> None:
        raise NotImplementedError


class _InOrder(TrialScheduler):
    """Mixed into a Tune scheduler: trials start in the order in which they were asked.

    Tune starts pending trials so by itself. Its schedulers look for one among all trials there ever were
    before every event.
    """

    def choose_trial_to_run(self, tune_controller) -> None:
        return None


class _FIFO(_InOrder, FIFOScheduler): ...


class _ASHA(_InOrder, _Remembers, AsyncHyperBandScheduler):
    def _tell(self, trial, epochs: Mapping[int, float]) -> None:
        sign = 1.0 if self._mode == "max" else -1.0
        for epoch, value in sorted(epochs.items()):
            self._trial_info[trial.trial_id].on_result(trial, epoch, sign * value)


class _Median(_InOrder, _Remembers, MedianStoppingRule):
    def _tell(self, trial, epochs: Mapping[int, float]) -> None:
        for epoch, value in sorted(epochs.items()):
            self._results[trial].append({self._time_attr: epoch, self._metric: value})


def build_scheduler(config: SchedulerConfig, epochs: int, memory: Memory | None = None) -> TrialScheduler:
    """A Tune scheduler; time is counted in epochs.

    Args:
        epochs: the most that a trial may train.
        memory: of a search that goes on. ASHA has its rungs again and the median rule its results, as if it
            had seen all.
    """
    scheduler = _scheduler(config, epochs)
    if memory is not None and isinstance(scheduler, _Remembers):
        scheduler.memory = memory
    return scheduler


def _scheduler(config: SchedulerConfig, epochs: int) -> TrialScheduler:
    match config:
        case NoSchedulerConfig() | HyperbandConfig():  # see `hiertune.search.hyperband`
            return _FIFO()
        case ASHAConfig():
            return _ASHA(
                max_t=epochs,
                grace_period=min(config.grace_epochs, epochs),
                reduction_factor=config.reduction_factor,
            )
        case MedianConfig():
            return _Median(
                time_attr="training_iteration",
                grace_period=config.grace_epochs,
                min_samples_required=config.min_trials,
            )
    raise AssertionError(config)
