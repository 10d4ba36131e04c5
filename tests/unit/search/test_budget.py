"""When a search has had enough."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiertune.config import SearchSection, parse_duration
from hiertune.search.budget import Budget, as_duration
from hiertune.search.ledger import TrialRecord, Used


def record(value, state="completed", number=0):
    return TrialRecord(number, state, {}, value)


def budget(ended=(), trials=32, mode="max", **limits):
    return Budget(SearchSection(**limits), trials, mode, ended)


def ending(budget, seconds=0.0, worker_seconds=0.0):
    found = budget.ending(Used(seconds, worker_seconds))
    return None if found is None else (found.by, found.reason, found.limit, found.cuts)


def test_without_limits_only_the_trials_count():
    it = budget([record(0.5)], trials=2)
    assert ending(it, 1e9, 1e9) is None
    it.trial_ended(record(None, "failed"))
    assert ending(it) == ("trials", "all trials ended", 2, False)


def test_the_time_budget_is_spent_when_it_is_reached():
    it = budget(time_budget="2h")
    assert ending(it, 7199.9) is None
    assert ending(it, 7200.0) == ("time_budget", "time budget of 2h spent", 7200.0, True)


def test_worker_hours_are_counted_in_hours():
    it = budget(worker_hours=1.5)
    assert ending(it, 1e9, 5399.9) is None
    assert ending(it, 0.0, 5400.0) == ("worker_hours", "budget of 1.5 worker-hours spent", 1.5, True)


def test_when_all_trials_have_ended_nothing_else_is_the_reason():
    it = budget([record(0.5)] * 3, trials=3, time_budget=1, worker_hours=0.1, patience=1)
    assert ending(it, 1e9, 1e9)[0] == "trials"


@pytest.mark.parametrize(
    ("mode", "values", "patience", "enough"),
    [
        ("max", [0.5, 0.4, 0.4], 2, True),
        ("max", [0.5, 0.4, 0.6], 2, False),
        ("max", [0.5, 0.5, 0.5], 2, True),  # an equal value is no improvement
        ("min", [0.5, 0.4, 0.6], 2, False),
        ("min", [0.5, 0.6, 0.6], 2, True),
        ("max", [0.5, None, None], 2, True),  # failed ones better nothing
        ("max", [None, None, None], 2, False),  # there is nothing to better yet
        ("max", [0.5, 0.4, 0.4, 0.6], 2, False),  # of earlier sessions only the last trials count
    ],
)
def test_patience(mode, values, patience, enough):
    records = [record(value, "failed" if value is None else "completed") for value in values]
    reason = f"no improvement in the last {patience} trials"
    assert ending(budget(records, mode=mode, patience=patience)) == (
        ("patience", reason, patience, False) if enough else None
    )


def test_a_pruned_trial_betters_nothing_however_good_its_last_epoch_was():
    assert ending(budget([record(0.5), record(0.9, "pruned")], patience=1))[0] == "patience"


@given(
    st.lists(st.tuples(st.sampled_from(["completed", "pruned", "failed"]), st.integers(0, 4)), max_size=12),
    st.integers(1, 5),
)
def test_patience_is_what_its_definition_says(trials, patience):
    records = [record(float(value), state, number) for number, (state, value) in enumerate(trials)]

    def betters(i):
        before = [each.value for each in records[:i] if each.state == "completed"]
        return records[i].state == "completed" and (not before or records[i].value > max(before))

    improvements = [i for i in range(len(records)) if betters(i)]
    in_vain = len(records) - 1 - improvements[-1] if improvements else 0
    found = ending(budget(records, patience=patience))
    assert (found is not None) == (in_vain >= patience)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(7200.0, "2h"), (5400.0, "90m"), (90.0, "90s"), (172800.0, "2d"), (0.5, "0.5s"), (129600.0, "36h")],
)
def test_durations_are_written_as_in_yaml(seconds, text):
    assert as_duration(seconds) == text
    assert parse_duration(text) == seconds


def test_an_ending_in_words():
    found = budget(time_budget="2h").ending(Used(7200.0, 0.0))
    states = {"completed": 12, "pruned": 5, "interrupted": 2}
    assert found.sentence(states, 32) == "time budget of 2h spent: 17 of 32 trials, 2 interrupted"
    assert found.sentence({"completed": 12}, 32) == "time budget of 2h spent: 12 of 32 trials"
    assert found.sentence({"completed": 9, "outside": 7}, 9) == "time budget of 2h spent: 9 of 9 trials"
    lowered = "time budget of 2h spent: 9 trials, 5 were asked for"
    assert found.sentence({"completed": 9}, 5) == lowered
