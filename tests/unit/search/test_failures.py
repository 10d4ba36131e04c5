"""When a search gives up because its trials fail for one cause."""

import pytest

from hiertune.search.failures import FailureStreak, cause_of
from hiertune.search.ledger import TrialRecord


def failed(reason, fault="error", number=0):
    return TrialRecord(number, "failed", {}, None, reason, fault=fault)


def streak(*records, limit=3):
    counted = FailureStreak(limit)
    for record in records:
        counted.trial_ended(record)
    return counted


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            "train/loss is not finite at epoch 1, step 7",
            "train/loss is not finite at epoch 12, step 3041",
        ),
        (
            "KeyError: 'x' (/home/a/trials/0001/file.py:3)",
            "KeyError: 'x' (/home/a/trials/0017/file.py:30)",
        ),
        ("bad tensor at 0x7f00aa", "bad tensor at 0x7f00ab12"),
        ("ValueError: 1.5e-7 is too small", "ValueError: -3 is too small"),
        ("node 0123456789abcdef01 is gone", "node ffff456789abcdef02 is gone"),
    ],
)
def test_numbers_addresses_and_paths_do_not_tell_causes_apart(one, other):
    assert cause_of(failed(one)) == cause_of(failed(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (failed("KeyError: 'lr'"), failed("KeyError: 'momentum'")),
        (failed("killed", "crashed"), failed("killed", "out_of_memory")),
        (failed("train/loss is not finite"), failed("val/loss is not finite")),
    ],
)
def test_other_words_and_other_faults_are_other_causes(one, other):
    assert cause_of(one) != cause_of(other)


def test_it_breaks_at_the_limit_and_says_the_last_reason():
    records = [failed(f"no space at {number}") for number in range(3)]
    assert not streak(*records[:2]).broken
    broken = streak(*records)
    assert broken.broken
    assert broken.verdict == "3 trials in a row failed for one cause: no space at 2"


@pytest.mark.parametrize(
    "between",
    [
        TrialRecord(9, "completed", {}, 0.5),
        TrialRecord(9, "pruned", {}, 0.5, "stopped by the scheduler after epoch 1"),
        failed("something else"),
        failed("a", "diverged"),
    ],
    ids=["completed", "pruned", "other reason", "other fault"],
)
def test_a_trial_that_ends_otherwise_begins_the_count_anew(between):
    assert not streak(failed("a"), failed("a"), between, failed("a"), failed("a")).broken
    assert streak(failed("a"), failed("a"), between, *[failed("a")] * 3).broken


def test_a_broken_one_stays_broken_whatever_those_that_still_ran_come_to():
    broken = streak(*[failed("a")] * 3, TrialRecord(9, "completed", {}, 0.5), failed("b"))
    assert broken.broken
    assert broken.verdict == "3 trials in a row failed for one cause: a"


def test_the_limit_may_be_one():
    assert streak(failed("a"), limit=1).broken
    assert not streak(limit=1).broken
