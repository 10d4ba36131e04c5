"""Tune's own schedulers: one that saw every epoch decides as one that was told what the ledger holds."""

import random
from types import SimpleNamespace

import pytest
from ray.tune.schedulers import TrialScheduler

from hiertune.config import ASHAConfig, HyperbandConfig, MedianConfig, NoSchedulerConfig
from hiertune.search.strategies import Memory, build_scheduler

EPOCHS = 9
NOBODY_WAITS = SimpleNamespace(get_live_trials=list)
"""What the schedulers ask Tune's controller."""


class Trial:
    """What Tune's schedulers see of a trial."""

    def __init__(self, number, session):
        self.trial_id = f"{session}_{number}"
        self.config = {"job": SimpleNamespace(id=f"trial-{number}")}


def curve(number):
    draw = random.Random(number)
    skill = draw.random()
    return [skill * (1 - 0.8**epoch) + 0.05 * draw.random() for epoch in range(1, EPOCHS + 1)]


class Session:
    """Runs trials as Tune does: results to the scheduler, the last one as the trial's completion."""

    def __init__(self, config, mode, memory=None, name="a"):
        self.scheduler = build_scheduler(config, EPOCHS, memory)
        assert self.scheduler.set_search_properties("val/it", mode)
        self.trials, self.decisions, self.name = {}, [], name
        self.sign = 1 if mode == "max" else -1

    def epoch(self, number, epoch):
        """Whether the trial goes on."""
        if number not in self.trials:
            self.trials[number] = Trial(number, self.name)
            self.scheduler.on_trial_add(NOBODY_WAITS, self.trials[number])
        trial = self.trials[number]
        result = {"training_iteration": epoch, "val/it": self.sign * curve(number)[epoch - 1]}
        if epoch == EPOCHS:
            self.scheduler.on_trial_complete(NOBODY_WAITS, trial, result)
            return False
        decision = self.scheduler.on_trial_result(NOBODY_WAITS, trial, result)
        self.decisions.append((number, epoch, decision))
        return decision == TrialScheduler.CONTINUE


def run(session, trials, seed, told, at_once=4, until=None):
    """Some trials at a time in random order. `told`: the last epoch of each, carried over sessions."""
    draw = random.Random(seed)
    waiting = [n for n in range(trials) if told.get(n, (0, True))[1]]
    live = []
    for step in range(10_000):
        if step == until:
            return
        while waiting and len(live) < at_once:
            live.append(waiting.pop(0))
        if not live:
            return
        number = draw.choice(live)
        epoch = told.get(number, (0, True))[0] + 1
        goes_on = session.epoch(number, epoch)
        told[number] = (epoch, goes_on)
        if not goes_on:
            live.remove(number)


SCHEDULERS = [
    ASHAConfig(grace_epochs=1),
    ASHAConfig(grace_epochs=2, reduction_factor=2),
    MedianConfig(grace_epochs=2, min_trials=2),
]


@pytest.mark.parametrize("config", SCHEDULERS, ids=str)
@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("cut", [1, 17, 40, 80])
def test_a_resumed_scheduler_decides_as_one_that_saw_everything(config, mode, cut):
    told = {}
    whole = Session(config, mode)
    run(whole, 30, 1, told, until=cut)
    ended = {n for n, (_, goes_on) in told.items() if not goes_on}
    memory = Memory(*(
        {
            f"trial-{n}": {e: whole.sign * curve(n)[e - 1] for e in range(1, epoch + 1)}
            for n, (epoch, _) in told.items()
            if (n in ended) == wanted
        }
        for wanted in (True, False)
    ))  # fmt: skip
    resumed = Session(config, mode, memory, name="b")
    # Trials that go on are there from the start, as both have then seen just the same.
    for number in sorted(set(told) - ended):
        resumed.trials[number] = Trial(number, "b")
        resumed.scheduler.on_trial_add(NOBODY_WAITS, resumed.trials[number])

    before = len(whole.decisions)
    run(whole, 30, 2, dict(told))
    run(resumed, 30, 2, dict(told))
    assert whole.decisions[before:] == resumed.decisions
    decisions = [decision for *_, decision in resumed.decisions]
    assert len(set(decisions)) == 2 or cut == 80


def test_without_its_memory_the_scheduler_would_decide_otherwise():
    told, config = {}, SCHEDULERS[0]
    whole = Session(config, "max")
    run(whole, 30, 1, told, until=40)
    forgetful = Session(config, "max", name="b")
    before = len(whole.decisions)
    run(whole, 30, 2, dict(told))
    run(forgetful, 30, 2, dict(told))
    assert whole.decisions[before:] != forgetful.decisions


def test_a_trial_that_goes_on_is_counted_once():
    memory = Memory(running={"trial-0": {1: 0.5, 2: 0.5}}, ended={"trial-1": {1: 0.25}})
    session = Session(ASHAConfig(grace_epochs=1), "max", memory)
    session.epoch(0, 3)
    rungs = dict(session.scheduler._brackets[0]._rungs)
    assert rungs[1] == {"trial-1": 0.25, "a_0": 0.5}


@pytest.mark.parametrize("config", [NoSchedulerConfig(), HyperbandConfig()])
def test_where_tune_stops_nobody_it_remembers_nothing(config):
    assert not hasattr(build_scheduler(config, EPOCHS, Memory()), "memory")
