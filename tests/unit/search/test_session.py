"""What a run of the driver uses of the budgets, and when it halts: with a clock that the test moves."""

import pytest

from hiertune.config import SearchSection
from hiertune.search.budget import Budget
from hiertune.search.failures import FailureStreak
from hiertune.search.interrupt import Interruption
from hiertune.search.ledger import Ledger, TrialRecord, Used
from hiertune.search.session import Session


class Told:
    """A display and a worker pool, which only remember."""

    def __init__(self):
        self.reasons, self.halts = [], 0

    def stopping(self, ending):
        self.reasons.append(None if ending is None else ending.reason)

    def halt(self):
        self.halts += 1


@pytest.fixture
def begin(tmp_path):
    """`begin(limits)`: a session of the search in tmp_path, its clock (one number), what it told."""

    def start(interruption=None, trials=32, **limits):
        path = tmp_path / "ledger.log"
        ledger = Ledger.open(path, "search", "max", resume=path.exists())
        budget = Budget(SearchSection(**limits), trials, "max", ledger.ended())
        told, now = Told(), [1000.0]
        session = Session(
            ledger,
            budget,
            interruption or Interruption(),
            told,
            2,
            told.halt,
            FailureStreak(2),
            clock=lambda: now[0],
        )
        return session, now, told

    return start


def trained(session, seconds):
    session.trial_reported(0, 1, {"epoch_seconds": seconds, "val/loss": 9.0})


def completed(session, value):
    session.trial_ended(TrialRecord(0, "completed", {}, value))


def test_a_streak_of_failures_halts_what_runs(begin):
    session, _, told = begin()
    for number in range(2):
        session.look()
        assert not session.halted
        session.trial_ended(TrialRecord(number, "failed", {}, None, "no space left", fault="error"))
    session.look()
    assert session.halted
    assert told.halts == 1


def test_the_clock_ends_a_search_whose_trials_only_wait(begin):
    session, now, told = begin(time_budget="10m")
    now[0] += 599
    session.look()
    assert (session.halted, told.halts, told.reasons) == (False, 0, [])
    now[0] += 1
    session.look()
    session.look()
    assert session.halted
    assert (told.halts, told.reasons) == (1, ["time budget of 10m spent"])


def test_budgets_count_over_all_sessions_and_a_killed_one_to_its_last_note(begin):
    session, now, _ = begin(time_budget=100, worker_hours=1.0)
    trained(session, 600.0)
    now[0] += 30
    session.look()
    now[0] += 3  # killed before the next note
    session, now, _ = begin(time_budget=100, worker_hours=1.0)
    assert session.used == Used(30.0, 1200.0)  # two workers
    now[0] += 69
    assert not session.halted
    now[0] += 1
    assert session.ending.by == "time_budget"


def test_worker_hours_are_training_times_workers(begin):
    session, _, told = begin(worker_hours=1.0)
    trained(session, 1799.0)
    session.look()
    assert not session.halted
    trained(session, 1.0)
    session.look()
    assert (session.halted, told.halts, told.reasons) == (True, 1, ["budget of 1 worker-hours spent"])


def test_patience_lets_running_trials_come_to_their_own_end(begin):
    session, _, told = begin(patience=2)
    for value in (0.5, 0.4, 0.3):
        assert session.ending is None
        completed(session, value)
    session.look()
    assert (session.ending.by, session.halted) == ("patience", False)
    completed(session, 0.2)  # one that was running
    session.look()
    assert (told.halts, told.reasons) == (0, ["no improvement in the last 2 trials"])
    completed(session, 0.9)  # another one: no new trial was begun, so the search ends all the same
    assert session.ending.reason == "no improvement in the last 2 trials"


def test_the_user_is_heard_after_patience_and_before_a_budget(begin):
    interruption = Interruption()
    session, now, told = begin(interruption, patience=1, time_budget=10)
    completed(session, 0.5)
    completed(session, 0.5)
    session.look()
    interruption.asked = True
    session.look()
    now[0] += 20
    session.look()
    assert session.halted
    assert (told.halts, told.reasons) == (1, ["no improvement in the last 1 trials", None])


def test_that_all_trials_have_ended_needs_no_word(begin):
    session, _, told = begin(trials=1)
    completed(session, 0.5)
    session.look()
    assert (session.ending.by, session.halted, told.reasons) == ("trials", False, [])


def test_a_session_that_is_over_halts_nothing_more(begin):
    session, now, told = begin(time_budget="10m")
    with session:
        pass
    now[0] += 600
    session.look()  # a note that took long: the winner is being measured by now
    assert told.halts == 0


def test_notes_are_seldom_in_a_long_session(begin):
    session, now, _ = begin()
    notes = []
    session._ledger.note_session = lambda number, **values: notes.append(values["seconds"])
    for _ in range(4 * 3600):
        now[0] += 1
        session.look()
    gaps = [later - earlier for earlier, later in zip([0.0, *notes], notes, strict=False)]
    assert gaps[0] == 5.0
    assert max(gaps) == 60.0
    assert all(gap <= max(6.0, 0.01 * at + 1) for gap, at in zip(gaps, notes, strict=True))


def test_the_end_is_noted_and_the_next_session_is_another(begin):
    session, now, _ = begin()
    with session:
        now[0] += 7.5
    again, now, _ = begin()
    with again:
        now[0] += 2.5
    assert [each["seconds"] for each in again._ledger.sessions()] == [7.5, 2.5]
