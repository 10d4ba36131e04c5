"""Samplers and schedulers by config: which settings to try next, which trials to stop early."""

from __future__ import annotations

import warnings

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


def build_scheduler(config: SchedulerConfig, epochs: int) -> TrialScheduler:
    """A Tune scheduler; time is counted in epochs. `epochs` is the most that a trial may train."""
    match config:
        case NoSchedulerConfig():
            return FIFOScheduler()
        case ASHAConfig():
            return AsyncHyperBandScheduler(
                max_t=epochs,
                grace_period=min(config.grace_epochs, epochs),
                reduction_factor=config.reduction_factor,
            )
        case MedianConfig():
            return MedianStoppingRule(
                time_attr="training_iteration",
                grace_period=config.grace_epochs,
                min_samples_required=config.min_trials,
            )
        case HyperbandConfig():
            return HyperBandScheduler(max_t=epochs, reduction_factor=config.reduction_factor)
    raise AssertionError(config)
