"""Samplers and schedulers that differ from Optuna's and Tune's only in what they cost."""

import warnings

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from hiertune.config import ASHAConfig, MedianConfig, NoSchedulerConfig, TPEConfig
from hiertune.search.strategies import build_sampler, build_scheduler

RANGE = optuna.distributions.FloatDistribution(0.0, 1.0)
CHOICE = optuna.distributions.CategoricalDistribution(["a", "b"])


def trials(count):
    """Completed, pruned, failed and running ones, of a conditional space, the earliest among the best."""
    made = []
    for number in range(count):
        x = (number * 0.618) % 1
        params, distributions = {"x": x, "kind": "ab"[number % 2]}, {"x": RANGE, "kind": CHOICE}
        if number % 2:
            params["y"], distributions["y"] = (number * 0.414) % 1, RANGE
        value = 1 - (x - 0.3) ** 2 + (number < 40)
        state = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.COMPLETE)[number % 4]
        if number % 97 == 96:
            state = TrialState.RUNNING
        made.append(
            create_trial(
                params=params,
                distributions=distributions,
                state=state,
                value=value if state == TrialState.COMPLETE else None,
                intermediate_values={1: value} if state == TrialState.PRUNED else {},
            )
        )
    return made


def draws(sampler, known, count=5):
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.add_trials(known)
    found = []
    for _ in range(count):
        trial = study.ask()
        if trial.suggest_categorical("kind", CHOICE.choices) == "b":
            trial.suggest_float("y", 0.0, 1.0)
        trial.suggest_float("x", 0.0, 1.0)
        found.append(trial.params)
    return found


def optunas(seed=0):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)


def test_tpe_is_optunas_as_long_as_it_considers_all_trials():
    assert draws(build_sampler(TPEConfig(), 0), trials(300)) == draws(optunas(), trials(300))


def test_tpe_considers_the_newest_trials_the_best_ones_and_those_that_run():
    known = trials(600)
    ended = [trial for trial in known if trial.state.is_finished()]
    best = sorted((trial for trial in ended if trial.value is not None), key=lambda trial: -trial.value)[:25]
    kept = [trial for trial in known if trial in ended[-100:] or trial in best or trial not in ended]
    assert len(kept) < 140
    considered = draws(build_sampler(TPEConfig(considered_trials=100), 0), known)
    assert considered == draws(optunas(), kept)
    assert considered != draws(optunas(), known)


class NoTrials:
    """A controller with so many trials that nobody should look for one."""

    def get_trials(self):
        raise AssertionError("all trials there ever were are searched for one to start")


@pytest.mark.parametrize("config", [NoSchedulerConfig(), ASHAConfig(), MedianConfig()])
def test_schedulers_that_pause_nothing_leave_the_start_of_trials_to_tune(config):
    assert build_scheduler(config, 8).choose_trial_to_run(NoTrials()) is None
