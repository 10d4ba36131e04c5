"""The ledger on a real Optuna journal file, and what the searcher tells it."""

import optuna
import pytest

from hiertune.config import DataConfig, TrialConfig
from hiertune.errors import InputError
from hiertune.search.ledger import Ledger
from hiertune.search.messages import Job, Measured
from hiertune.search.searcher import LedgerSearcher

CONFIG = TrialConfig(data=DataConfig(path="none.h5"))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.log"


def open_ledger(path, resume=False, mode="max"):
    ledger = Ledger.open(path, "search", mode, resume=resume)
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
    with pytest.raises(InputError, match="no search to resume"):
        open_ledger(path, resume=True)
    open_ledger(path)
    with pytest.raises(InputError, match="begun with mode max"):
        open_ledger(path, resume=True, mode="min")


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
def search(path):
    ledger, recorder = open_ledger(path), Recorder()
    interrupted = []

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
    )
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
    ("last", "error", "reason"),
    [
        (
            {"state": "failed", "reason": "train/loss is nan", "training_iteration": 2},
            False,
            "train/loss is nan",
        ),
        (None, True, "its trial actor died"),
    ],
)
def test_a_failed_trial_is_told_with_its_reason(search, last, error, reason):
    searcher, ledger, _, _ = search
    searcher.suggest("t")
    searcher.on_trial_result("t", result(1, 0.5, state="running"))
    searcher.on_trial_complete("t", last, error=error)
    assert ledger.study.trials[0].state == optuna.trial.TrialState.FAIL
    assert ledger.records()[0].reason == reason


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
    assert [record.getMessage() for record in caplog.records] == ["trial 0: one", "trial 0: two"]


def test_all_that_a_weighting_reports_is_passed_on(search):
    searcher, _, recorder, _ = search
    searcher.suggest("t")
    measured = {f"{name}/a": 0.5 for name in ("weight", "grad_norm", "target", "rate")}
    searcher.on_trial_result("t", result(1, 0.5, state="running", **measured))
    assert recorder.events[-1] == ("reported", 0, 1, {"val/accuracy": 0.5, "lr": 0.1, **measured})
