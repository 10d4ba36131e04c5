"""Hyperband on real ledgers, with worker groups that report in any order, against the paper's algorithm."""

import contextlib
import math
import random
from itertools import count

import optuna
import pytest
from definitions import hyperband, hyperband_brackets
from hypothesis import given
from hypothesis import strategies as st

from hiertune._database import Place
from hiertune._journal import unsynced
from hiertune.config import DataConfig, TrialConfig
from hiertune.search.hyperband import Bracket, Hyperband, brackets
from hiertune.search.ledger import Ledger, put_outside
from hiertune.search.messages import Job, Measured
from hiertune.search.searcher import LedgerSearcher

EPOCHS, FACTOR = 9, 3
CONFIG = TrialConfig(data=DataConfig(path="none.h5"))


def test_the_brackets_of_the_paper():
    """Its table 1, for R = 81 and eta = 3; there epochs are rounded to whole ones, too."""
    assert brackets(81, 3) == [
        Bracket(81, (1, 3, 9, 27, 81)),
        Bracket(34, (3, 9, 27, 81)),
        Bracket(15, (9, 27, 81)),
        Bracket(8, (27, 81)),
        Bracket(5, (81,)),
    ]
    assert brackets(20, 3) == [Bracket(9, (2, 6, 20)), Bracket(5, (6, 20)), Bracket(3, (20,))]
    assert brackets(1, 3) == [Bracket(1, (1,))]


@given(epochs=st.integers(1, 1000), factor=st.integers(2, 10))
def test_brackets_are_those_of_the_definition(epochs, factor):
    expected = [Bracket(n, tuple(rungs)) for n, rungs in hyperband_brackets(epochs, factor)]
    assert brackets(epochs, factor) == expected
    assert all(list(each.rungs) == sorted(set(each.rungs)) for each in expected)


# -------------------------------------------------------------------------------- a whole search


class Killed(BaseException):
    pass


class Search:
    """Sessions of one search. A worker group trains one epoch after another, and any of them reports next.

    What outlives a session is the ledger, the checkpoints, and what listeners were told.
    """

    def __init__(self, folder, value, fails=(), trials=20, epochs=EPOCHS, factor=FACTOR, mode="max"):
        folder.mkdir(exist_ok=True)
        self.place = Place(folder / "ledger.log")
        self.value, self.fails, self.trials = value, dict(fails), trials
        self.epochs, self.factor, self.mode = epochs, factor, mode
        self.checkpoints, self.trained, self.told = {}, [], {}
        self.enough = self.halted = False
        self.unsynced = contextlib.ExitStack()
        Ledger.open(self.place, "search", self.mode, resume=False)

    def session(self, groups=1, seed=0, kill_at=None, steps=None, halt_at=None):
        """To its end, or for so many `steps`, or halted after `halt_at`, or killed before a write."""
        ledger, writes = self.open(), count()

        def dying(name, method):
            def call(*args, **options):
                if next(writes) == kill_at:
                    raise Killed(name)
                return method(*args, **options)

            return call

        storage, draw = ledger.storage, random.Random(seed)
        for name in ("create_new_trial", "set_trial_user_attr"):
            setattr(storage, name, dying(name, getattr(storage, name)))
        for name in ("set_trial_state_values", "set_trial_intermediate_value"):
            setattr(storage, name, dying(name, getattr(storage, name)))
        searcher = self.searcher(ledger, groups)
        live, ids = {}, map(str, count())
        for step in count():
            while isinstance(begun := searcher.suggest(name := next(ids)), dict):
                live[name] = begun["job"]
            assert len(live) <= groups
            if step == steps or (begun == "FINISHED" and not live):
                return ledger
            self.halted = step == halt_at or self.halted
            assert live, "everybody waits for what can't happen"
            name = draw.choice(sorted(live))
            if self.train(searcher, name, live[name]):
                del live[name]

    def open(self):
        ledger = Ledger.open(self.place, "search", self.mode, resume=True)
        ledger.study.sampler = optuna.samplers.RandomSampler(seed=0)
        self.unsynced.enter_context(unsynced(ledger.storage))
        return ledger

    def searcher(self, ledger, groups):
        def suggest(trial):
            trial.suggest_float("x", 0.0, 1.0)
            return CONFIG

        return LedgerSearcher(
            ledger,
            suggest,
            lambda number, config: Job(f"trial-{number}", config, str(number)),
            "broker",
            "val/accuracy",
            self.mode,
            self,
            halted=lambda: self.halted,
            enough=lambda: self.enough,
            trials=self.trials,
            groups=lambda: groups,
            hyperband=Hyperband(ledger, self.epochs, self.factor),
        )

    def train(self, searcher, name, job):
        """The trial's next result, as its actor gives it. Whether it was the last one."""
        number = int(job.folder)
        done = self.checkpoints.get(number, 0)
        if job.until is not None and done >= job.until:
            searcher.on_trial_complete(name, {"state": "paused", "training_iteration": done + 1})
            return True
        epoch = done + 1
        if epoch == self.fails.get(number):
            reason = {"reason": "loss", "fault": "diverged"}
            searcher.on_trial_complete(name, {"state": "failed", "training_iteration": epoch, **reason})
            return True
        self.trained.append((number, epoch))
        value = self.value(number, epoch)
        metrics = Measured({"val/accuracy": value, "val/loss": -value})
        told = {"training_iteration": epoch, "val/accuracy": value, "measured": metrics}
        if epoch == self.epochs:
            searcher.on_trial_complete(name, told | {"state": "completed"})
            return True
        if self.halted:
            searcher.on_trial_complete(name, told | {"state": "running"})
            self.checkpoints[number] = epoch
            return True
        searcher.on_trial_result(name, told | {"state": "running"})
        self.checkpoints[number] = epoch  # as a worker writes it, once it has been told to go on, or to stop
        return False

    def ends(self):
        records = self.open().records()
        for record in records:
            if record.state != "failed":
                value = self.value(record.number, record.epochs)
                assert (record.value, record.metrics) == (value, {"val/accuracy": value, "val/loss": -value})
            if record.state == "pruned":
                assert record.reason == f"stopped by the scheduler after epoch {record.epochs}"
        return {record.number: (record.state, record.epochs) for record in records}

    # As a listener it is told nothing that contradicts what it was told before.

    def trial_started(self, number, config, params):
        assert self.told.setdefault(number, params) == params

    def trial_reported(self, number, epoch, metrics):
        assert self.told.setdefault((number, epoch), metrics) == metrics

    def trial_ended(self, record):
        assert self.told.setdefault(("end", record.number), record.state) == record.state


def table(seed):
    """Curves that cross, with some equal values."""

    def value(number, epoch):
        return round(random.Random(f"{seed} {number} {epoch}").random(), 1)

    return value


@pytest.mark.parametrize("mode", ["max", "min"])
def test_whom_hyperband_stops_by_hand(tmp_path, mode):
    """The first bracket is compared after 1 and 3 epochs, the second after 3, the third not at all."""
    sign = 1 if mode == "max" else -1
    search = Search(tmp_path, lambda number, epoch: sign * number, {8: 2, 12: 3}, trials=17, mode=mode)
    search.session()
    assert search.ends() == {
        **dict.fromkeys(range(6), ("pruned", 1)),  # of nine the best three go on
        6: ("pruned", 3),
        7: ("completed", 9),  # the best of the three that is left
        8: ("failed", 1),
        9: ("pruned", 3),
        10: ("pruned", 3),
        11: ("pruned", 3),
        12: ("failed", 2),
        13: ("completed", 9),  # of five one, as floor(5 / 3) = 1
        14: ("completed", 9),
        15: ("completed", 9),
        16: ("completed", 9),
    }


@pytest.mark.parametrize("groups", [1, 2, 4, 30])
@pytest.mark.parametrize("trials", [3, 17, 20, 41])
def test_with_any_number_of_worker_groups_just_those_of_the_definition_are_stopped(tmp_path, groups, trials):
    for seed in range(3):
        draw = random.Random(seed)
        fails = {number: draw.randint(1, 9) for number in range(trials) if draw.random() < 0.2 * seed}
        search = Search(tmp_path / str(seed), table(seed), fails, trials)
        search.session(groups, seed)
        assert search.ends() == hyperband(trials, table(seed), fails)
        assert len(search.trained) == len(set(search.trained)), "an epoch was trained twice"


def test_the_number_that_goes_on_is_that_of_the_whole_bracket_divided_again_and_again(tmp_path):
    shape = {"epochs": 8, "factor": 2}  # of eight trials four go on, then two, then one
    search = Search(tmp_path, table(1), {0: 2, 9: 1}, trials=26, **shape)
    search.session(groups=3)
    ends = search.ends()
    assert [epochs for _, epochs in ends.values()].count(8) == 1 + 1 + 2 + 4 + 1
    assert ends == hyperband(26, table(1), {0: 2, 9: 1}, **shape)


def test_a_bracket_of_which_all_trials_fail_stops_no_other(tmp_path):
    search = Search(tmp_path, table(0), fails=dict.fromkeys(range(9), 1), trials=14)
    search.session(groups=4)
    ends = search.ends()
    assert {ends[number] for number in range(9)} == {("failed", 0)}
    assert ends == hyperband(14, table(0), dict.fromkeys(range(9), 1))


def test_an_objective_that_is_no_number_never_goes_on(tmp_path):
    search = Search(tmp_path, table(0))
    ledger = search.open()
    plan = Hyperband(ledger, EPOCHS, FACTOR)
    trials = [plan.next(True)[0] for _ in range(9)]
    for trial in trials:
        ledger.begin(trial)
        ledger.report(trial, 1, {0: 0.1, 1: math.nan, 2: -math.inf, 3: math.inf, 4: 0.2}.get(trial.number, 0))
        plan.let_go(trial.number)
        ledger.pause(trial, 1.0)
    assert plan.decide(True) == [1, 2, 3, 6, 7, 8]


@pytest.mark.parametrize("groups", [1, 3])
def test_killed_before_any_write_and_resumed_it_stops_the_same(tmp_path, groups):
    fails, shape = {1: 2, 4: 1}, {"epochs": 4, "factor": 2}
    for at in range(1000):
        search = Search(tmp_path / str(at), table(5), fails, trials=8, **shape)
        killed = 0
        for kill_at in (at, at // 2):
            try:
                search.session(groups, seed=at, kill_at=kill_at)
            except Killed:
                killed += 1
        search.session(groups, seed=2)
        assert search.ends() == hyperband(8, table(5), fails, **shape)
        assert len(search.trained) - len(set(search.trained)) <= killed
        if not killed:
            assert at > 50
            return
    raise AssertionError("the search never came to its end")


@pytest.mark.parametrize("halt_at", range(1, 40, 3))
def test_halted_after_any_epoch_and_resumed_it_stops_the_same(tmp_path, halt_at):
    search = Search(tmp_path, table(3), {3: 1, 9: 4}, trials=14)
    search.session(groups=3, halt_at=halt_at)
    search.halted = False
    search.session(groups=2)
    assert search.ends() == hyperband(14, table(3), {3: 1, 9: 4})
    assert len(search.trained) == len(set(search.trained))


def test_trials_that_are_asked_for_later_begin_a_new_bracket_unless_the_last_one_is_still_whole(tmp_path):
    search = Search(tmp_path, lambda number, epoch: 0.01 * number, trials=11)
    search.session(groups=2)
    # The second bracket was halved with the two of five trials that there were.
    assert {number: search.ends()[number] for number in (9, 10)} == {9: ("pruned", 3), 10: ("completed", 9)}
    search.trials = 15
    search.session(groups=2, steps=1)
    attrs = [attrs["bracket"] for attrs in search.open().attrs()]
    assert attrs == [*[0] * 9, 1, 1, 2, 2]
    search.trials = 16
    search.session(groups=2)
    # The third is of three trials that are not compared; two of the fourth bracket's nine are left.
    assert {number: search.ends()[number] for number in range(11, 16)} == {
        **dict.fromkeys((11, 12, 13), ("completed", 9)),
        14: ("pruned", 1),
        15: ("completed", 9),
    }


def test_when_it_is_enough_what_has_begun_comes_to_its_end(tmp_path):
    search = Search(tmp_path, lambda number, epoch: 0.01 * number, trials=17)
    search.session(groups=2, steps=9)
    begun = len(search.open().records())
    assert 2 < begun < 9
    search.enough = True
    search.session(groups=2)
    assert search.ends() == hyperband(begun, search.value)


def test_trials_outside_a_changed_space_are_compared_with_nobody_and_keep_their_places(tmp_path):
    search = Search(tmp_path, lambda number, epoch: 1 - 0.01 * number, trials=9)
    search.session(groups=9, steps=17)  # each of nine trials takes two, to report and to let its group go
    ledger = search.open()
    assert {record.state for record in ledger.records()} == {"running"}

    def carry(frozen, record):
        return put_outside(frozen, {}, "why", 1) if record.number in (0, 1) else frozen

    ledger.revise("another", carry)
    search.trials = 8  # 7 of the present space, and one more
    search.session(groups=2)
    ends = search.ends()
    assert ends.pop(0)[0] == ends.pop(1)[0] == "outside"
    assert {number for number in ends if ends[number][1] >= 3} == {2, 3, 4, 9}
    assert ends[9] == ("completed", 9)
    assert {number for number in range(2, 9) if ends[number] == ("completed", 9)} == {2}


def test_trials_of_another_scheduler_are_trained_to_their_end(tmp_path):
    search = Search(tmp_path, lambda number, epoch: 0.01 * number, trials=10)
    ledger = search.open()
    for _ in range(2):
        trial = ledger.next_trial()
        trial.suggest_float("x", 0.0, 1.0)
        ledger.begin(trial)
    search.session(groups=2)
    ends = search.ends()
    assert ends[0] == ends[1] == ("completed", 9)
    assert [number for number in range(2, 10) if ends[number][1] > 1] == [8, 9]
