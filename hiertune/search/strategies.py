"""Samplers and schedulers by config: which settings to try next, which trials to stop early."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import optuna
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandScheduler,
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


def build_sampler(config: SamplerConfig, seed: int) -> optuna.samplers.BaseSampler:
    """An Optuna sampler. `seed` decides every draw as long as trials are asked one after another."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # `group` has been for years
        return _sampler(config, seed)


def _sampler(config: SamplerConfig, seed: int) -> optuna.samplers.BaseSampler:
    match config:
        case TPEConfig():
            # Without multivariate and group, Optuna samples conditional parameters one by one, silently.
            return optuna.samplers.TPESampler(
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


class _ASHA(_Remembers, AsyncHyperBandScheduler):
    def _tell(self, trial, epochs: Mapping[int, float]) -> None:
        sign = 1.0 if self._mode == "max" else -1.0
        for epoch, value in sorted(epochs.items()):
            self._trial_info[trial.trial_id].on_result(trial, epoch, sign * value)


class _Median(_Remembers, MedianStoppingRule):
    def _tell(self, trial, epochs: Mapping[int, float]) -> None:
        for epoch, value in sorted(epochs.items()):
            self._results[trial].append({self._time_attr: epoch, self._metric: value})


def build_scheduler(config: SchedulerConfig, epochs: int, memory: Memory | None = None) -> TrialScheduler:
    """A Tune scheduler; time is counted in epochs.

    Args:
        epochs: the most that a trial may train.
        memory: of a search that goes on. ASHA has its rungs again and the median rule its results, as if it
            had seen all. Hyperband begins anew: it compares the trials of a bracket, whose members, halted
            and waiting for one another, are gone with the session.
    """
    scheduler = _scheduler(config, epochs)
    if memory is not None and isinstance(scheduler, _Remembers):
        scheduler.memory = memory
    return scheduler


def _scheduler(config: SchedulerConfig, epochs: int) -> TrialScheduler:
    match config:
        case NoSchedulerConfig():
            return FIFOScheduler()
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
        case HyperbandConfig():
            return HyperBandScheduler(max_t=epochs, reduction_factor=config.reduction_factor)
    raise AssertionError(config)
