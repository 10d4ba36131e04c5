"""The real driver, ledger and schedulers on simulated worker groups: every trial is accounted for."""

import collections

import numpy as np
import pandas as pd
import pytest
from definitions import hyperband

from hiertune.search.ledger import Ledger
from hiertune.tracking.spool import SPOOL, count, parse

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TRIALS, GROUPS, EPOCHS = 300, 50, 16
GRACE, FACTOR = 1, 4


@pytest.fixture(scope="module")
def simulation(bench_module, tmp_path_factory):
    module = bench_module("_simulation")
    scheduler = f"{{kind: asha, grace_epochs: {GRACE}, reduction_factor: {FACTOR}}}"
    setting = module.Setting(TRIALS, GROUPS, EPOCHS, scheduler=scheduler, ranks=2, failing=0.1)
    simulation = module.Simulation(setting, tmp_path_factory.mktemp("scale"))
    simulation.run()
    return simulation


@pytest.fixture(scope="module")
def trials(simulation):
    return pd.read_csv(simulation.plan.folder.trials, index_col="trial")


@pytest.fixture(scope="module")
def objectives(simulation):
    """The objective of every report: trial, epoch, value, in the order in which the driver heard of them."""
    curves = pd.read_csv(simulation.plan.folder.curves)
    return curves[curves.metric == simulation.plan.metric].drop(columns="metric")


def asha(objectives):
    """Whom asynchronous successive halving stops, and after which epoch: Li et al. 2018, with the promotion
    rule turned into a stopping rule as in Ray Tune, of values to maximise."""
    rungs = collections.defaultdict(list)
    stopped = {}
    milestones = [GRACE * FACTOR**k for k in range(10) if GRACE * FACTOR**k < EPOCHS]
    for trial, epoch, value in objectives.itertuples(index=False):
        assert trial not in stopped, "it was stopped, and reported on"
        if epoch in milestones:
            if rungs[epoch] and value < np.quantile(rungs[epoch], 1 - 1 / FACTOR):
                stopped[trial] = epoch
            rungs[epoch].append(value)
    return stopped


def test_every_trial_is_there_once_and_has_come_to_an_end(simulation, trials):
    assert list(trials.index) == list(range(TRIALS))
    states = trials.state.value_counts().to_dict()
    assert set(states) == {"completed", "pruned", "failed"}
    assert sum(states.values()) == TRIALS
    plan = simulation.plan
    records = Ledger.open(plan.folder.ledger, plan.config.name, plan.mode, resume=True).records()
    assert [(record.number, record.state) for record in records] == list(trials.state.items())


def test_every_report_arrived_once_in_curves_and_ledger(simulation, trials, objectives):
    assert len(objectives) == simulation.groups.reports
    assert not objectives.duplicated(["trial", "epoch"]).any()
    reported = objectives.groupby("trial").epoch
    first_to_last = reported.agg(["min", "max", "count"])
    assert (first_to_last["min"] == 1).all()
    assert (first_to_last["max"] == first_to_last["count"]).all()
    ended = trials[trials.state != "failed"]
    assert (first_to_last.loc[ended.index, "max"] == ended.epochs).all()
    plan = simulation.plan
    ledger = Ledger.open(plan.folder.ledger, plan.config.name, plan.mode, resume=True)
    told = {
        (trial.number, epoch): value
        for trial in ledger.study.get_trials(deepcopy=False)
        for epoch, value in trial.intermediate_values.items()
    }
    assert told == {(row.trial, row.epoch): row.value for row in objectives.itertuples()}


def test_asha_stopped_whom_an_independent_reckoning_stops(trials, objectives):
    pruned = trials[trials.state == "pruned"]
    assert asha(objectives) == pruned.epochs.to_dict()
    assert (trials[trials.state == "completed"].epochs == EPOCHS).all()


def test_the_spool_holds_every_value_once(simulation, trials, objectives):
    spool = (simulation.plan.folder.root / SPOOL).read_bytes().splitlines()
    records = [parse(line) for line in spool]
    logged = [
        (record["trial"], record["step"]) for record in records if record["op"] == "log" and record["step"]
    ]
    assert logged == list(objectives[["trial", "epoch"]].itertuples(index=False, name=None))
    ends = {record["trial"]: record["state"] for record in records if record["op"] == "end"}
    assert {trial: state for trial, state in ends.items() if trial is not None} == trials.state.to_dict()
    assert records[-1]["n"] == sum(map(count, records))


def test_failed_trials_keep_their_reason(trials):
    failed = trials[trials.state == "failed"]
    assert failed.reason.str.fullmatch(r"the loss was not finite in epoch [1-4]").all()


def test_groups_are_never_idle_while_trials_wait(simulation):
    """Until the last trials run out every group trains: the search takes at most as long as an even share
    of all epochs and the longest trial one after the other (Graham's bound for list scheduling)."""
    share = simulation.groups.busy / GROUPS
    assert simulation.groups.waited == 0  # the driver takes no virtual time
    assert simulation.loop.time() <= share + simulation.groups.longest


@pytest.mark.parametrize("groups", [1, 2, 4, 30])
def test_hyperband_stops_those_of_the_definition_with_any_number_of_worker_groups(
    bench_module, tmp_path, groups
):
    module = bench_module("_simulation")
    scheduler = "{kind: hyperband, reduction_factor: 3}"
    setting = module.Setting(29, groups, 9, scheduler=scheduler, ranks=2, failing=0.5)
    simulation = module.Simulation(setting, tmp_path)
    simulation.run()
    trials = pd.read_csv(simulation.plan.folder.trials, index_col="trial")
    curves = pd.read_csv(simulation.plan.folder.curves)
    values = curves[curves.metric == simulation.plan.metric].set_index(["trial", "epoch"]).value
    failed = trials[trials.state == "failed"]
    assert failed.reason.str.fullmatch(r"the loss was not finite in epoch [1-4]").all()
    fails = dict(failed.epochs + 1)
    assert len(fails) > 3
    expected = hyperband(29, lambda *at: values[at], fails, 9, 3)
    assert dict(zip(trials.index, zip(trials.state, trials.epochs, strict=True), strict=True)) == expected
    assert len(values) == simulation.groups.reports == trials.epochs.sum(), "no epoch is trained twice"
