"""The ledger by the same rules on a journal file, SQLite and PostgreSQL, and what the searcher tells it."""

import json
import math
import os
import resource
import signal
import time
from concurrent import futures

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState

from hiertune._database import Place
from hiertune._journal import JournalFile
from hiertune.config import DataConfig, TrialConfig
from hiertune.errors import InputError
from hiertune.record import newest_study, open_storage
from hiertune.search.ledger import Ledger, LedgerLost, Used, carried_over, put_outside
from hiertune.search.messages import Job, Measured
from hiertune.search.searcher import LedgerSearcher

CONFIG = TrialConfig(data=DataConfig(path="none.h5"))


@pytest.fixture(params=["journal", "sqlite", "postgresql"])
def path(request, tmp_path):
    """Where the ledger is."""
    journal = tmp_path / "ledger.log"
    if request.param == "journal":
        return Place(journal)
    if request.param == "sqlite":
        return Place(journal, f"sqlite:///{tmp_path}/ledger.db")
    return Place(journal, request.getfixturevalue("postgresql"))


def open_ledger(path, resume=False, mode="max", **identity):
    ledger = Ledger.open(path, "search", mode, resume=resume, **identity)
    ledger.study.sampler = optuna.samplers.RandomSampler(seed=0)
    return ledger


def ask(ledger):
    trial = ledger.next_trial()
    trial.suggest_float("x", 0.0, 1.0)
    return trial


def test_states_values_and_attributes_are_told_as_they_were(path):
    ledger = open_ledger(path)
    done, pruned, failed = ask(ledger), ask(ledger), ask(ledger)
    ledger.report(done, 1, 0.5)
    ledger.report(done, 2, 0.75)
    ledger.tell(done, "completed", value=0.75, epochs=2, seconds=1.25, metrics={"val/loss": 0.1})
    ledger.report(pruned, 1, 0.25)
    ledger.tell(pruned, "pruned", epochs=1, reason="stopped by the scheduler after epoch 1")
    ledger.tell(failed, "failed", reason="loss is nan")

    records = open_ledger(path, resume=True).records()
    assert [record.state for record in records] == ["completed", "pruned", "failed"]
    assert [record.value for record in records] == [0.75, 0.25, None]
    assert [record.reason for record in records][1:] == [
        "stopped by the scheduler after epoch 1",
        "loss is nan",
    ]
    assert records[0].metrics == {"val/loss": 0.1}
    assert (records[0].epochs, records[0].seconds) == (2, 1.25)
    assert records[0].params == done.params


def test_a_pruned_trial_is_pruned_at_its_step_in_optuna(path):
    ledger = open_ledger(path)
    trial = ask(ledger)
    ledger.report(trial, 3, 0.4)
    ledger.tell(trial, "pruned", epochs=3)
    frozen = ledger.study.trials[0]
    assert frozen.state == optuna.trial.TrialState.PRUNED
    assert frozen.intermediate_values == {3: 0.4}


def test_what_an_interruption_left_is_taken_up_first_under_its_own_number(path):
    ledger = open_ledger(path)
    ledger.tell(ask(ledger), "failed")
    left = ask(ledger)
    ledger.report(left, 1, 0.5)

    resumed = open_ledger(path, resume=True)
    again, new = ask(resumed), ask(resumed)
    assert (again.number, new.number) == (1, 2)
    assert again.params == left.params
    resumed.report(again, 1, 0.5)  # the epoch that was reported before is not doubled
    resumed.tell(again, "completed", value=0.6, epochs=2)
    assert resumed.study.trials[1].intermediate_values == {1: 0.5}


@pytest.mark.parametrize(("mode", "best"), [("max", 1), ("min", 0)])
def test_the_best_is_completed_and_the_earliest_of_equals(path, mode, best):
    ledger = open_ledger(path, mode=mode)
    for state, value in [("completed", 0.1), ("completed", 0.9), ("completed", 0.9), ("pruned", 5.0)]:
        trial = ask(ledger)
        ledger.report(trial, 1, value)
        ledger.tell(trial, state, value=value)
    assert ledger.best().number == best


def test_resuming_needs_a_ledger_of_the_same_mode(path):
    with pytest.raises(InputError, match=r"no search to resume|holds no searches named 'search'"):
        open_ledger(path, resume=True)
    open_ledger(path)
    with pytest.raises(InputError, match="holds a search already"):
        open_ledger(path)
    with pytest.raises(InputError, match="begun with mode max"):
        open_ledger(path, resume=True, mode="min")


def frozen_trials(path):
    """As a process that opens the ledger anew has them."""
    storage = open_storage(path)
    return storage.get_all_trials(newest_study(path, storage)._study_id)


@pytest.mark.parametrize(
    ("now", "problem"),
    [
        ({"metric": "val/loss"}, "begun with the objective val/accuracy, and this is val/loss"),
        ({"fingerprint": "b" * 64}, "the data is not what the search was begun with .*bbbb, then aaaa"),
    ],
)
def test_results_that_could_not_be_compared_are_refused(path, now, problem):
    begun = {"metric": "val/accuracy", "fingerprint": "a" * 64, "space": "name: search"}
    open_ledger(path, **begun)
    with pytest.raises(InputError, match=problem):
        open_ledger(path, resume=True, **begun | now)
    identity = open_ledger(path, resume=True, **begun).identity
    assert (identity.metric, identity.mode, identity.revision) == ("val/accuracy", "max", 1)
    assert (identity.space, identity.fingerprint, identity.version) == ("name: search", "a" * 64, "0.1.0")


def test_a_trial_is_recorded_whole_or_not_at_all(path):
    ledger = open_ledger(path)
    trial = ledger.next_trial()
    trial.suggest_float("x", 0.0, 1.0)
    trial.suggest_categorical("y", [None, "a", 3, True])
    assert frozen_trials(path) == []
    ledger.begin(trial)
    (frozen,) = frozen_trials(path)
    assert (frozen.state, frozen.params) == (TrialState.RUNNING, trial.params)
    again = open_ledger(path, resume=True).next_trial()
    assert (again.number, again.params) == (0, trial.params)


def test_a_trial_that_lacks_parameters_is_completed(path):
    """As ledgers of earlier versions can have it, which recorded one parameter after another."""
    ledger = open_ledger(path)
    at = ledger.storage.create_new_trial(ledger.study_id)
    distribution = optuna.distributions.FloatDistribution(0.0, 1.0)
    ledger.storage.set_trial_param(at, "x", 0.25, distribution)
    resumed = open_ledger(path, resume=True)
    trial = ask(resumed)
    trial.suggest_int("n", 1, 5)
    resumed.begin(trial)
    (frozen,) = frozen_trials(path)
    assert frozen.params == {"x": 0.25, "n": trial.params["n"]}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_what_is_no_number_never_completes_a_trial(path, value):
    ledger = open_ledger(path)
    record = ledger.tell(ask(ledger), "completed", value=value, epochs=3, metrics={"val/loss": 1.0})
    assert (record.state, record.fault, record.reason) == ("failed", "diverged", f"the objective is {value}")
    assert frozen_trials(path)[0].state == TrialState.FAIL
    assert open_ledger(path, resume=True).records() == [record]
    assert ledger.best() is None


def test_incidents_are_noted_once_and_count_as_attempts(path):
    ledger = open_ledger(path)
    trial = ask(ledger)
    first = {"fault": "crashed", "reason": "signal 11", "epoch": 1, "time": 1.5}
    second = first | {"epoch": 2, "time": 2.5}
    ledger.note(trial, [first])
    ledger.note(trial, [first, second])
    ledger.note(trial, [])
    resumed = open_ledger(path, resume=True)
    again = ask(resumed)
    record = resumed.tell(again, "failed", reason="signal 11", fault="crashed")
    (same,) = open_ledger(path, resume=True).records()
    assert same == record
    assert (same.incidents, same.attempts, same.fault) == ((first, second), 3, "crashed")


def test_the_time_of_all_sessions_counts(path):
    ledger = open_ledger(path)
    ledger.pause(ask(ledger), 1.5)
    resumed = open_ledger(path, resume=True)
    assert resumed.records()[0].seconds == 1.5
    record = resumed.tell(ask(resumed), "completed", value=1.0, seconds=2.0)
    assert record.seconds == 3.5
    assert open_ledger(path, resume=True).records()[0].seconds == 3.5


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_the_sampler_goes_on_with_its_notes(path):
    """A quasi-random sequence keeps its place in the study, so it does not begin again."""

    def opened(resume):
        ledger = Ledger.open(path, "search", "max", resume=resume)
        ledger.study.sampler = optuna.samplers.QMCSampler(seed=1, warn_independent_sampling=False)
        return ledger

    def run(ledger, count):
        for _ in range(count):
            trial = ask(ledger)
            ledger.tell(trial, "completed", value=trial.params["x"])

    run(opened(False), 3)
    run(opened(True), 3)
    taken = [trial.params["x"] for trial in frozen_trials(path)]
    study = optuna.create_study(
        sampler=optuna.samplers.QMCSampler(seed=1, warn_independent_sampling=False), direction="maximize"
    )
    study.optimize(lambda trial: trial.suggest_float("x", 0.0, 1.0), 6)
    assert taken[1:] == [trial.params["x"] for trial in study.trials][1:], "the first is drawn independently"


def test_the_memory_of_a_study_is_what_the_storage_has(path):
    ledger = open_ledger(path)
    for number, state in enumerate(["completed", "pruned", "failed"]):
        trial = ask(ledger)
        ledger.report(trial, 1, 0.5 + number)
        ledger.tell(trial, state, value=0.5 + number)
    ledger.begin(ask(ledger))

    def seen(frozen):
        return frozen.number, frozen.state, frozen.params, frozen.values, frozen.intermediate_values

    assert list(map(seen, ledger.study.trials)) == list(map(seen, frozen_trials(path)))
    assert ledger.records() == open_ledger(path, resume=True).records()
    assert ledger.epochs() == {0: {1: 0.5}, 1: {1: 1.5}, 2: {1: 2.5}, 3: {}}


# ------------------------------------------------------------------------------------- revisions


def revised(ledger, space="b"):
    """Trials 0 and 2 (running) are carried over, with a wider range; 1 and 3 (running) are left outside."""
    wide = {"x": optuna.distributions.FloatDistribution(-5.0, 5.0)}

    def carry(frozen, record):
        if frozen.number in (1, 3):
            return put_outside(frozen, {"is": frozen.number}, "x: too small", ledger.identity.revision)
        return carried_over(frozen, frozen.params, wide, {"from": 1})

    ledger.revise(space, carry)


@pytest.fixture
def four(path):
    ledger = open_ledger(path, space="a", metric="val/accuracy")
    for value in (0.5, 0.9):
        trial = ask(ledger)
        ledger.report(trial, 1, value)
        ledger.tell(trial, "completed", value=value, epochs=1, seconds=2.0, metrics={"val/loss": value})
    for _ in range(2):
        trial = ask(ledger)
        ledger.begin(trial)
        ledger.report(trial, 1, 0.7)
    return ledger


def test_a_revision_keeps_numbers_and_results(path, four):
    before = four.records()
    revised(four)
    for ledger in (four, open_ledger(path, resume=True)):
        assert (ledger.identity.revision, ledger.identity.space, ledger.space_of(1)) == (2, "b", "a")
        records = ledger.records()
        assert [record.state for record in records] == ["completed", "outside", "running", "outside"]
        assert records[0] == before[0]
        assert records[2] == before[2]
        assert records[1].reason == "x: too small"
        for old, new in zip(before, records, strict=True):
            assert (old.number, old.params, old.metrics) == (new.number, new.params, new.metrics)
            assert (old.epochs, old.seconds) == (new.epochs, new.seconds)
        assert [record.number for record in ledger.ended()] == [0]
        assert ledger.best().number == 0
        assert ledger.epochs() == {0: {1: 0.5}, 2: {1: 0.7}}
        assert [trial.number for trial in ledger.study.trials] == [0, 2], "samplers do not see the others"

    resumed = open_ledger(path, resume=True)
    again = resumed.next_trial()
    assert again.number == 2
    assert again.suggest_float("x", -5.0, 5.0) == before[2].params["x"]
    resumed.begin(again)
    resumed.tell(again, "completed", value=0.8)
    new = resumed.next_trial()
    new.suggest_float("x", -5.0, 5.0)
    resumed.tell(new, "completed", value=0.6)
    assert [record.number for record in open_ledger(path, resume=True).ended()] == [0, 2, 4]


def test_what_was_outside_can_come_back(path, four):
    before = [(r.state, r.params, r.value, r.metrics) for r in four.records()]
    revised(four)
    distribution = {"x": optuna.distributions.FloatDistribution(0.0, 2.0)}
    four.revise("c", lambda frozen, record: carried_over(frozen, record.params, distribution, {"from": 2}))
    ledger = open_ledger(path, resume=True)
    assert [(r.state, r.params, r.value, r.metrics) for r in ledger.records()] == before
    assert ledger.identity.revision == 3
    assert {ledger.next_trial().number for _ in range(2)} == {2, 3}


class Killed(BaseException):
    pass


def killing(storage, at):
    """Raises before the `at`-th write (from 0), as if the process was gone."""
    writes = iter(range(10_000))

    def wrapped(name, function):
        def write(*args, **options):
            if next(writes) == at:
                raise Killed(name)
            return function(*args, **options)

        return write

    for name in ("create_new_study", "delete_study", "create_new_trial"):
        setattr(storage, name, wrapped(name, getattr(storage, name)))
    for name in ("set_study_user_attr", "set_study_system_attr", "set_trial_param", "set_trial_user_attr"):
        setattr(storage, name, wrapped(name, getattr(storage, name)))
    for name in ("set_trial_state_values", "set_trial_intermediate_value"):
        setattr(storage, name, wrapped(name, getattr(storage, name)))
    return writes


def test_a_revision_killed_at_any_write_holds_wholly_or_not_at_all(path, four):
    before, at = four.records(), 0
    while True:
        ledger = open_ledger(path, resume=True)
        assert ledger.records() == before
        assert ledger.identity.revision == 1
        killing(ledger.storage, at)
        try:
            revised(ledger)
        except Killed:
            at += 1
            continue
        break
    assert at == 1 + 4 + 1 + (at > 6), "the study, its trials, what it is; and the half of the one before"
    resumed = open_ledger(path, resume=True)
    assert resumed.identity.revision == 2
    assert [record.state for record in resumed.records()] == ["completed", "outside", "running", "outside"]


class Recorder:
    def __init__(self):
        self.events = []

    def trial_started(self, number, config, params):
        self.events.append(("started", number))

    def trial_reported(self, number, epoch, metrics):
        self.events.append(("reported", number, epoch, metrics))

    def trial_ended(self, record):
        self.events.append(("ended", record.number, record.state, record.reason))


@pytest.fixture
def groups():
    """One entry per worker group."""
    return [1, 2]


@pytest.fixture
def search(path, groups):
    return searching(path, groups)


def searching(path, groups):
    ledger, recorder = open_ledger(path), Recorder()
    interrupted, enough = [], []

    def suggest(trial):
        trial.suggest_float("x", 0.0, 1.0)
        return CONFIG

    searcher = LedgerSearcher(
        ledger,
        suggest,
        lambda number, config: Job(f"trial-{number}", config, "/nowhere"),
        "broker",
        "val/accuracy",
        "max",
        recorder,
        lambda: bool(interrupted),
        lambda: bool(enough),
        100,
        lambda: len(groups),
    )
    searcher.test_enough = enough
    return searcher, ledger, recorder, interrupted


def result(epoch, value, **more):
    metrics = {"val/accuracy": value, "lr": 0.1, **{name: each for name, each in more.items() if "/" in name}}
    rest = {name: each for name, each in more.items() if "/" not in name}
    return {
        "training_iteration": epoch,
        "val/accuracy": value,
        "pid": 7,
        "measured": Measured(metrics),
        **rest,
    }


def test_a_completed_trial(search):
    searcher, ledger, recorder, _ = search
    given = searcher.suggest("t")
    assert (given["broker"], given["job"].id) == ("broker", "trial-0")
    searcher.on_trial_result("t", result(1, 0.5, state="running"))
    searcher.on_trial_complete("t", result(2, 0.6, state="completed"))
    record = ledger.records()[0]
    assert (record.state, record.value, record.epochs) == ("completed", 0.6, 2)
    assert ledger.study.trials[0].intermediate_values == {1: 0.5, 2: 0.6}
    assert recorder.events == [
        ("started", 0),
        ("reported", 0, 1, {"val/accuracy": 0.5, "lr": 0.1}),
        ("reported", 0, 2, {"val/accuracy": 0.6, "lr": 0.1}),
        ("ended", 0, "completed", None),
    ]


def test_no_more_trials_are_live_than_there_are_worker_groups_at_present(search, groups):
    searcher, ledger, _, interrupted = search
    assert all(isinstance(searcher.suggest(name), dict) for name in ("a", "b"))
    assert searcher.suggest("c") is None, "not now"
    groups.append(3)
    assert isinstance(searcher.suggest("c"), dict)
    groups.clear()
    searcher.on_trial_complete("a", result(1, 0.5, state="completed"))
    assert searcher.suggest("d") is None
    assert len(ledger.records()) == 3, "nothing is asked for that can't run"
    interrupted.append(True)
    assert searcher.suggest("d") == "FINISHED"


def test_where_ray_is_lost_nothing_is_told(search):
    class Left(BaseException):
        """Stands for leaving the process."""

    def leave():
        raise Left

    searcher, ledger, _, _ = search
    searcher._check = leave
    searcher.suggest("a")
    with pytest.raises(Left):
        searcher.on_trial_complete("a", None, error=True)
    assert [record.state for record in ledger.records()] == ["running"]


def test_a_trial_that_the_scheduler_stopped_is_pruned_with_the_epoch_that_stopped_it(search):
    searcher, ledger, _, _ = search
    searcher.suggest("t")
    searcher.on_trial_result("t", result(1, 0.5, state="running"))
    searcher.on_trial_complete("t", result(2, 0.4, state="running"))
    frozen = ledger.study.trials[0]
    assert frozen.state == optuna.trial.TrialState.PRUNED
    assert frozen.intermediate_values == {1: 0.5, 2: 0.4}
    assert ledger.records()[0].reason == "stopped by the scheduler after epoch 2"


@pytest.mark.parametrize(
    ("last", "error", "reason", "fault"),
    [
        (
            {"state": "failed", "reason": "train/loss is nan", "fault": "diverged", "training_iteration": 2},
            False,
            "train/loss is nan",
            "diverged",
        ),
        (None, True, "its trial actor died again and again", "lost"),
    ],
)
def test_a_failed_trial_is_told_with_its_reason(search, last, error, reason, fault):
    searcher, ledger, _, _ = search
    searcher.suggest("t")
    searcher.on_trial_result("t", result(1, 0.5, state="running"))
    searcher.on_trial_complete("t", last, error=error)
    assert ledger.study.trials[0].state == optuna.trial.TrialState.FAIL
    (record,) = ledger.records()
    assert (record.reason, record.fault, record.attempts) == (reason, fault, 1)


def test_a_trial_whose_actor_was_dead_before_it_began_is_begun_again(search):
    """Tune gives a trial to an idle actor, and if that has died to no other one."""
    searcher, ledger, recorder, _ = search
    for attempt in range(10):
        assert searcher.suggest(f"t{attempt}")["job"].id == "trial-0"
        searcher.on_trial_complete(f"t{attempt}", None, error=True)
    assert [record.state for record in ledger.records()] == ["running"]
    assert searcher.suggest("last")["job"].id == "trial-0"
    searcher.on_trial_complete("last", None, error=True)
    (record,) = ledger.records()
    assert (record.state, record.reason) == ("failed", "its trial actor died again and again")
    assert [kind for kind, *_ in recorder.events].count("started") == 1


def test_the_last_trial_may_be_lost_too(search):
    searcher, ledger, _, _ = search
    searcher._to_begin = 2
    assert [searcher.suggest(name)["job"].id for name in "ab"] == ["trial-0", "trial-1"]
    assert searcher.suggest("c") is None, "there is nothing to begin, but there may be"
    searcher.on_trial_complete("a", result(1, 0.5, state="completed"))
    searcher.on_trial_complete("b", None, error=True)
    assert searcher.suggest("d")["job"].id == "trial-1"
    searcher.on_trial_complete("d", result(1, 0.6, state="completed"))
    assert searcher.suggest("e") == "FINISHED"
    assert [record.value for record in ledger.records()] == [0.5, 0.6]


def test_an_interrupted_trial_stays_open_with_its_last_epoch_and_nothing_new_is_asked(search):
    searcher, ledger, recorder, interrupted = search
    searcher.suggest("t")
    searcher.on_trial_result("t", result(1, 0.5, state="running"))
    interrupted.append(True)
    searcher.on_trial_complete("t", result(2, 0.6, state="running"))
    assert searcher.suggest("u") == "FINISHED"
    assert [record.state for record in ledger.records()] == ["running"]
    assert ledger.study.trials[0].intermediate_values == {1: 0.5, 2: 0.6}
    assert [event[:3] for event in recorder.events] == [
        ("started", 0),
        ("reported", 0, 1),
        ("reported", 0, 2),
    ]


def test_a_trial_that_ends_by_itself_in_an_interruption_is_told(search):
    searcher, ledger, _, interrupted = search
    searcher.suggest("t")
    interrupted.append(True)
    searcher.on_trial_complete("t", result(1, 0.5, state="completed"))
    assert [record.state for record in ledger.records()] == ["completed"]


def test_a_result_that_comes_twice_is_reported_once(search):
    searcher, _, recorder, _ = search
    searcher.suggest("t")
    searcher.on_trial_result("t", result(1, 0.5, state="running"))
    searcher.on_trial_complete("t", result(1, 0.5, state="running"))
    assert [event[0] for event in recorder.events] == ["started", "reported", "ended"]


def test_what_a_trial_notes_is_logged_once(search, caplog):
    searcher, *_ = search
    searcher.suggest("t")
    with caplog.at_level("INFO", "hiertune"):
        searcher.on_trial_result("t", result(1, 0.5, state="running", notes=("one", "two")))
        searcher.on_trial_result("t", result(2, 0.5, state="running", notes=()))
        searcher.on_trial_complete("t", result(2, 0.5, state="completed", notes=("once",)))
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["trial 0: one", "trial 0: two", "trial 0: once"]


KILLED = {"fault": "crashed", "reason": "worker 2 of 2 was killed", "epoch": 1, "time": 100.5}
HUNG = {"fault": "hang", "reason": "no batch for 30 s at epoch 3", "epoch": 2, "time": 200.5}


def test_what_a_trial_survived_reaches_ledger_and_log_once(search, path, caplog):
    searcher, ledger, *_ = search
    searcher.suggest("t")
    with caplog.at_level("INFO", "hiertune"):
        searcher.on_trial_result("t", result(1, 0.5, state="running", incidents=[]))
        for _ in range(2):  # its actor was replaced
            searcher.on_trial_result("t", result(2, 0.5, state="running", incidents=[KILLED]))
        assert open_ledger(path, resume=True).records()[0].incidents == (KILLED,), "as it happens"
        searcher.on_trial_complete("t", result(3, 0.6, state="completed", incidents=[HUNG]))
    (record,) = ledger.records()
    assert (record.state, record.attempts, record.fault) == ("completed", 3, None)
    assert record.incidents == (KILLED, HUNG)
    assert [record.getMessage() for record in caplog.records] == [
        "trial 0 goes on after epoch 1: worker 2 of 2 was killed",
        "trial 0 goes on after epoch 2: no batch for 30 s at epoch 3",
    ]


def test_all_that_a_weighting_reports_is_passed_on(search):
    searcher, _, recorder, _ = search
    searcher.suggest("t")
    measured = {f"{name}/a": 0.5 for name in ("weight", "grad_norm", "target", "rate")}
    searcher.on_trial_result("t", result(1, 0.5, state="running", **measured))
    assert recorder.events[-1] == ("reported", 0, 1, {"val/accuracy": 0.5, "lr": 0.1, **measured})


def test_a_trial_that_no_worker_held_stays_open(search):
    searcher, ledger, recorder, _ = search
    searcher.suggest("t")
    searcher.on_trial_complete("t", {"state": "interrupted", "training_iteration": 1})
    assert [record.state for record in ledger.records()] == ["running"]
    assert [event[0] for event in recorder.events] == ["started"]


@pytest.mark.parametrize("how", ["halted", "not held"])
def test_what_an_interrupted_trial_took_is_kept_for_the_session_that_ends_it(search, path, monkeypatch, how):
    searcher, _, _, interrupted = search
    clock = iter([100.0, 107.5])
    monkeypatch.setattr("hiertune.search.searcher.time.monotonic", lambda: next(clock))
    searcher.suggest("t")
    if how == "halted":
        interrupted.append(True)
        searcher.on_trial_complete("t", result(1, 0.5, state="running"))
    else:
        searcher.on_trial_complete("t", {"state": "interrupted", "training_iteration": 1})
    ledger = open_ledger(path, resume=True)
    assert [record.state for record in ledger.records()] == ["running"]
    assert ledger.tell(ledger.next_trial(), "failed", seconds=2.0).seconds == 9.5


def test_when_it_is_enough_only_interrupted_trials_are_begun(search, path):
    searcher, ledger, _, _ = search
    searcher.suggest("t")
    searcher.test_enough.append(True)
    assert searcher.suggest("u") is None, "the one that is live may be lost, and then goes on"
    searcher._live.clear()
    assert searcher.suggest("u") == "FINISHED"
    searcher._ledger = Ledger.open(path, ledger.study.study_name, "max", resume=True)
    assert searcher.suggest("t again")["job"].id == "trial-0"
    assert searcher.suggest("u") is None
    assert len(ledger.records()) == 1


def test_what_sessions_used_is_added_up_and_read_back(path):
    ledger = open_ledger(path)
    assert ledger.used() == Used(0.0, 0.0)
    ledger.note_session(0, begun=1e9, seconds=5.0, worker_seconds=8.0)
    ledger.note_session(0, begun=1e9, seconds=10.5, worker_seconds=20.0)  # what is noted last counts
    for number in range(1, 12):
        ledger.note_session(number, begun=1e9 + number, seconds=1.0, worker_seconds=2.0)
    again = Ledger.open(path, ledger.study.study_name, "max", resume=True)
    assert again.used() == Used(21.5, 42.0)
    assert [session["begun"] - 1e9 for session in again.sessions()] == list(range(12))


def test_ended_trials_come_in_the_order_of_their_ends(path):
    ledger = open_ledger(path)
    first, second = ask(ledger), ask(ledger)
    ledger.begin(first)
    ledger.tell(second, "completed", value=0.5)
    ledger.tell(first, "failed", reason="x")
    assert [record.number for record in ledger.ended()] == [1, 0]


# ------------------------------------------------------------------- a kill between any two writes


class Spool:
    """A listener that outlives the process, and takes nothing twice; `told` has every call."""

    def __init__(self):
        self.told, self.kept = [], {}

    def hear(self, what, key, value):
        self.told.append((what, *key))
        assert self.kept.setdefault((what, *key), value) == value, "another value for what is known"

    def trial_started(self, number, config, params):
        self.hear("started", (number,), dict(params))

    def trial_reported(self, number, epoch, metrics):
        self.hear("epoch", (number, epoch), metrics)

    def trial_ended(self, record):
        self.hear("ended", (record.number,), (record.state, record.value, record.reason))


class Dying:
    """A spool before whose `at`-th call the process is gone; counts on with the storage's writes."""

    def __init__(self, spool, writes, at):
        self._spool, self._writes, self._at = spool, writes, at

    def __getattr__(self, name):
        method = getattr(self._spool, name)

        def call(*args):
            if next(self._writes) == self._at:
                raise Killed(name)
            method(*args)

        return call


EPOCHS = {0: 3, 1: 2, 2: 3}
"""Trial 1 is stopped by the scheduler after two epochs."""


def train(path, spool, at, checkpoints):
    """A session of three trials with three epochs each; a trial goes on from the epoch of its checkpoint."""
    ledger = open_ledger(path, resume=True)
    writes = killing(ledger.storage, at)

    def suggest(trial):
        trial.suggest_float("x", 0.0, 1.0)
        trial.suggest_int("n", 1, 9)
        return CONFIG

    searcher = LedgerSearcher(
        ledger,
        suggest,
        lambda number, config: Job(f"trial-{number}", config, "/nowhere"),
        "broker",
        "val/accuracy",
        "max",
        Dying(spool, writes, at),
        halted=lambda: False,
        enough=lambda: False,
        trials=len(EPOCHS),
    )
    while len(ledger.ended()) < len(EPOCHS):
        number = int(searcher.suggest("t")["job"].id.removeprefix("trial-"))
        for epoch in range(checkpoints.get(number, 0) + 1, EPOCHS[number] + 1):
            told = result(epoch, number + epoch / 10, state="completed" if epoch == 3 else "running")
            if epoch == EPOCHS[number]:
                searcher.on_trial_complete("t", told)
            else:
                searcher.on_trial_result("t", told)
                checkpoints[number] = epoch


@pytest.mark.parametrize("kills", [1, 2])
def test_a_kill_between_any_two_writes_loses_nothing_and_doubles_nothing(tmp_path, kills):
    expected = None
    for at in range(100):
        path, spool, checkpoints = Place(tmp_path / f"{at}.log"), Spool(), {}
        open_ledger(path)
        killed = 0
        for _ in range(kills):
            try:
                train(path, spool, at if at else -1, checkpoints)
            except Killed:
                killed += 1
        train(path, spool, -1, checkpoints)
        (frozen_0, frozen_1, frozen_2) = frozen_trials(path)
        assert [frozen_0.state, frozen_1.state, frozen_2.state] == [
            TrialState.COMPLETE,
            TrialState.PRUNED,
            TrialState.COMPLETE,
        ]
        for number, frozen in enumerate((frozen_0, frozen_1, frozen_2)):
            epochs = {epoch: number + epoch / 10 for epoch in range(1, EPOCHS[number] + 1)}
            assert frozen.intermediate_values == epochs
            assert spool.kept["started", number] == frozen.params
            assert {key[2] for key in spool.kept if key[:2] == ("epoch", number)} == set(epochs)
            state = "pruned" if number == 1 else "completed"
            assert spool.kept["ended", number][:2] == (state, epochs[EPOCHS[number]])
            assert frozen.user_attrs["end"]["epochs"] == EPOCHS[number]
        # What is in the ledger is told to nobody again; a kill repeats one call at most.
        again = [call for call in set(spool.told) if call[0] != "started" and spool.told.count(call) > 1]
        assert len(again) <= killed
        if at == 0:
            expected = set(spool.kept)
        assert set(spool.kept) == expected
        if at and not killed:
            assert at > 20
            return
    raise AssertionError("the search never came to its end")


# ----------------------------------------------------------------------------- a damaged journal


@pytest.fixture
def journal(tmp_path):
    path = Place(tmp_path / "ledger.log")
    ledger = open_ledger(path)
    for _ in range(2):
        trial = ask(ledger)
        ledger.report(trial, 1, 0.5)
        ledger.tell(trial, "completed", value=0.5, reason="é\x00")
    return path


def test_a_journal_cut_at_any_byte_is_written_on(journal):
    whole = journal.journal.read_bytes()
    ends = [0, *(at + 1 for at, byte in enumerate(whole) if byte == ord("\n"))]
    for cut in range(0, len(whole), 37):
        for tail in (b"", b"\0" * 5, b"\0\n", b"{]\n\0"):
            journal.journal.write_bytes(whole[:cut] + tail)
            kept = max(end for end in ends if end <= cut)
            if kept == 0 and b"\n" in tail:
                continue  # a file without one whole entry is not a journal
            read = journal.journal.read_bytes()
            known = open_storage(journal).get_all_studies()
            assert journal.journal.read_bytes() == read, "who only reads changes nothing"
            assert len(known) == (kept >= ends[1])
            ledger = open_ledger(journal, resume=True)
            assert journal.journal.read_bytes()[:kept] == whole[:kept]
            ledger.begin(ask(ledger))
            lines = journal.journal.read_bytes().splitlines()
            assert all(json.loads(line) for line in lines)


@pytest.mark.parametrize("damage", [b"\0" * 10, b"{]", b"[]", b'{"op_code": 99}', b'{"op_code": 4}', b"\xff"])
def test_a_journal_damaged_in_the_middle_is_told_with_its_line(journal, damage):
    lines = journal.journal.read_bytes().splitlines()
    lines[2] = damage
    text = b"\n".join(lines) + b"\n"
    journal.journal.write_bytes(text)
    for opening in (lambda: open_ledger(journal, resume=True), lambda: open_storage(journal)):
        with pytest.raises(InputError) as raised:
            opening()
        assert (raised.value.file, raised.value.line) == (str(journal.journal), 3)
        assert journal.journal.read_bytes() == text


def test_a_lock_file_that_optuna_left_behind_costs_no_time(journal):
    journal.journal.with_name("ledger.log.lock").symlink_to(journal.journal)
    ledger = open_ledger(journal, resume=True)
    ledger.tell(ask(ledger), "failed")  # Optuna's own backend would wait for half a minute
    assert len(ledger.records()) == 3


def test_a_journal_that_cannot_be_written_is_said_and_stays_whole(journal, monkeypatch):
    ledger = open_ledger(journal, resume=True)
    trial = ask(ledger)
    ledger.begin(trial)
    whole = journal.journal.read_bytes()
    with monkeypatch.context() as context:

        def full(number):
            raise OSError(28, "No space left on device")

        context.setattr("os.fsync", full)
        with pytest.raises(LedgerLost, match=r"ledger\.log can't be written to: .*No space left"):
            ledger.report(trial, 1, 0.5)
    assert journal.journal.read_bytes() == whole
    with pytest.raises(LedgerLost, match="No space left"):
        ledger.tell(trial, "failed")  # from then on nothing more is written
    resumed = open_ledger(journal, resume=True)
    assert resumed.report(ask(resumed), 1, 0.5)
    assert open_ledger(journal, resume=True).epochs()[2] == {1: 0.5}


def test_of_an_entry_that_fits_in_part_nothing_stays(tmp_path):
    path = tmp_path / "ledger.log"
    journal = JournalFile(path, writable=True)
    journal.append_logs([{"a": 1}])
    whole, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, limits[1]))  # as a disk with 20 bytes left
    try:
        with pytest.raises(OSError, match="too large"):
            journal.append_logs([{"b": "x" * 40}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_bytes() == whole


def test_of_a_lost_ledger_nobody_hears_that_a_trial_has_ended(tmp_path, monkeypatch):
    searcher, _, recorder, _ = searching(Place(tmp_path / "ledger.log"), [1, 2])
    for trial_id in ("t", "u"):
        searcher.suggest(trial_id)
    searcher.on_trial_result("t", result(1, 0.5, state="running"))

    def full(number):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr("os.fsync", full)
        with pytest.raises(LedgerLost):  # what listeners heard of this one is told again later
            searcher.on_trial_complete("t", {"state": "failed", "reason": "bad", "fault": "error"})
    heard = len(recorder.events)
    with pytest.raises(LedgerLost):
        searcher.on_trial_result("u", result(1, 0.5, state="running"))
    with pytest.raises(LedgerLost):
        searcher.on_trial_complete("u", {"state": "failed", "reason": "bad", "fault": "error"})
    assert len(recorder.events) == heard


def test_what_a_search_has_used_is_known_while_the_database_is_away(path, monkeypatch):
    ledger = open_ledger(path)
    ledger.note_session(0, begun=1.0, seconds=10.0, worker_seconds=30.0)
    ledger = open_ledger(path, resume=True)
    ledger.note_session(1, begun=50.0, seconds=2.0, worker_seconds=4.0)

    def away(study_id):
        raise optuna.exceptions.StorageInternalError("connection refused")

    monkeypatch.setattr(ledger.storage, "get_study_user_attrs", away)
    assert ledger.used() == Used(12.0, 34.0)


def test_a_database_that_comes_back_is_written_to_once(postgresql, postgresql_server, tmp_path, monkeypatch):
    place = Place(tmp_path / "ledger.log", postgresql)
    ledger = open_ledger(place)
    trial = ask(ledger)
    ledger.begin(trial)
    postgresql_server.stop()
    waits = []

    def back(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            postgresql_server.start()

    monkeypatch.setattr("hiertune.search.ledger.time.sleep", back)
    try:
        assert ledger.report(trial, 1, 0.5)
        ledger.begin(ask(ledger))
    finally:
        if len(waits) < 2:
            postgresql_server.start()
    ledger.tell(trial, "completed", value=0.5)
    assert [record.state for record in open_ledger(place, resume=True).records()] == ["completed", "running"]
    assert open_ledger(place, resume=True).epochs() == {0: {1: 0.5}, 1: {}}


def test_a_database_that_never_comes_back_ends_it(postgresql, postgresql_server, tmp_path, monkeypatch):
    ledger = open_ledger(Place(tmp_path / "ledger.log", postgresql))
    trial = ask(ledger)
    ledger.begin(trial)
    waits = []
    monkeypatch.setattr("hiertune.search.ledger.time.sleep", waits.append)
    postgresql_server.stop()
    try:
        with pytest.raises(
            LedgerLost, match=r"postgresql\+psycopg://hiertune@.* can't be written to: "
        ) as raised:
            ledger.report(trial, 1, 0.5)
    finally:
        postgresql_server.start()
    assert "s3cret" not in str(raised.value)
    assert ledger.lost == str(raised.value)
    assert 30 < sum(waits) < 120


def test_a_database_that_hangs_for_a_moment_costs_time_alone(postgresql, postgresql_server, tmp_path):
    ledger = open_ledger(Place(tmp_path / "ledger.log", postgresql))
    trial = ask(ledger)
    ledger.begin(trial)
    with futures.ThreadPoolExecutor(1) as thread:
        with postgresql_server.hung():
            reporting = thread.submit(ledger.report, trial, 1, 0.5)
            assert not futures.wait([reporting], timeout=1).done
        assert reporting.result(60)
    assert ledger.lost is None


def test_a_database_that_hangs_is_one_that_is_away(postgresql, postgresql_server, tmp_path, monkeypatch):
    place = Place(tmp_path / "ledger.log", postgresql + "?connect_timeout=2")
    ledger = open_ledger(place)
    trial = ask(ledger)
    ledger.begin(trial)
    monkeypatch.setattr("hiertune._database.ANSWER_SECONDS", 0.5)
    monkeypatch.setattr("hiertune.search.ledger._PAUSES_S", (0.01,))
    begun = time.monotonic()
    with postgresql_server.hung(), pytest.raises(LedgerLost, match=r"written to: .*timeout") as raised:
        ledger.report(trial, 1, 0.5)
    assert 0.5 + 2 + 2 <= time.monotonic() - begun < 60, "an answer, and two connections"
    assert "s3cret" not in str(raised.value)
    resumed = open_ledger(place, resume=True)
    assert resumed.report(ask(resumed), 1, 0.5)


def test_a_trial_that_is_recorded_late_is_recorded_once(postgresql, postgresql_server, tmp_path, monkeypatch):
    """Its COMMIT is done only after the ledger has given up waiting, and has begun to write it again."""
    place = Place(tmp_path / "ledger.log", postgresql)
    ledger = open_ledger(place)
    stopped = []

    def stop(connection):
        if not stopped:
            stopped.append(connection.connection.dbapi_connection.info.backend_pid)
            os.kill(stopped[0], signal.SIGSTOP)

    def go_on_when_someone_waits_for_it(watching):
        try:
            deadline = time.monotonic() + 60
            while not watching.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchone():
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            os.kill(stopped[0], signal.SIGCONT)

    sqlalchemy.event.listen(ledger.storage.engine, "commit", stop)
    monkeypatch.setattr("hiertune._database.ANSWER_SECONDS", 2)
    with postgresql_server.connected() as watching, futures.ThreadPoolExecutor(1) as thread:
        going_on = thread.submit(go_on_when_someone_waits_for_it, watching)
        for _ in range(2):
            ledger.begin(ask(ledger))
        going_on.result(60)
    trials = open_storage(place).get_all_trials(ledger.study_id)
    assert [(trial.number, trial._trial_id) for trial in trials] == list(enumerate(ledger._ids))
    assert len(trials) == 2


def test_who_keeps_a_copy_hears_of_a_trial_when_the_journal_has_it(tmp_path):
    path = tmp_path / "ledger.log"
    ledger = Ledger.open(path, "search", "max", resume=False)
    heard = []
    ledger.told = lambda: heard.append(Ledger.open(path, "search", "max", resume=True).ended())
    trial = ledger.next_trial()
    ledger.report(trial, 1, 0.5)
    assert heard == []
    record = ledger.tell(trial, "completed", value=0.5, epochs=1)
    assert heard == [[record]]
