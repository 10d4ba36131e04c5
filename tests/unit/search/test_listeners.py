"""What ended trials leave behind."""

import pytest

from hiertune.search.ledger import TrialRecord
from hiertune.search.listeners import Checkpoints, TrackingListener
from hiertune.search.outputs import RunFolder
from hiertune.tracking import Tracker


def left(folder):
    trials = folder.root / "trials"
    return sorted(path.relative_to(trials).as_posix() for path in trials.rglob("*") if path.is_file())


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


def end(folder, number, state="completed", value=None, logits=True):
    """The record of a trial that has just ended, its files in its folder."""
    folder.trial(number).mkdir(parents=True)
    (folder.trial(number) / "checkpoint").touch()
    (folder.trial(number) / "checkpoint.other").touch()
    if state == "completed" and logits:
        folder.logits(number).touch()
    return TrialRecord(number, state, {}, value)


def test_only_the_best_trials_logits_stay(folder):
    checkpoints = Checkpoints(folder, "max", [])
    checkpoints.trial_ended(end(folder, 0, value=0.5))
    assert len(left(folder)) == 3, "its workers may still be writing"
    checkpoints.trial_ended(end(folder, 1, value=0.7))
    assert [name for name in left(folder) if name.startswith("0000")] == ["0000/val_logits.safetensors"]
    for number, state, value in [(2, "failed", None), (3, "completed", 0.7), (4, "pruned", 0.9)]:
        checkpoints.trial_ended(end(folder, number, state, value))
    checkpoints.sweep()
    assert left(folder) == ["0001/val_logits.safetensors"], "of equals the earliest, as in the ledger"


def test_the_best_is_the_smallest_where_the_objective_is_minimised(folder):
    checkpoints = Checkpoints(folder, "min", [])
    for number, value in enumerate([0.5, 0.2, 0.9]):
        checkpoints.trial_ended(end(folder, number, value=value))
    checkpoints.sweep()
    assert left(folder) == ["0001/val_logits.safetensors"]


def test_a_resumed_search_keeps_the_best_of_before_until_it_is_beaten(folder):
    before = [end(folder, number, value=value) for number, value in enumerate([0.4, 0.6, 0.5])]
    checkpoints = Checkpoints(folder, "max", before)
    checkpoints.trial_ended(end(folder, 3, value=0.1))
    checkpoints.sweep()
    assert left(folder) == ["0001/val_logits.safetensors"]
    checkpoints.trial_ended(end(folder, 4, value=0.8))
    checkpoints.sweep()
    assert left(folder) == ["0004/val_logits.safetensors"]


def test_nothing_is_left_where_no_logits_are_kept(folder):
    checkpoints = Checkpoints(folder, "max", [])
    for number in range(3):
        checkpoints.trial_ended(end(folder, number, value=number / 10, logits=False))
    checkpoints.sweep()
    assert list((folder.root / "trials").iterdir()) == []


class Spool(Tracker):
    def __init__(self):
        self.ended = []

    def trial_ended(self, *told):
        self.ended.append(told)


def test_tracking_is_told_how_often_a_trial_was_tried_and_what_ended_it():
    spool = Spool()
    incident = {"fault": "crashed", "reason": "killed", "epoch": 1, "time": 1.5}
    for record in (
        TrialRecord(0, "completed", {}, 0.5),
        TrialRecord(1, "failed", {}, None, "killed", fault="crashed", incidents=[incident] * 3),
    ):
        TrackingListener(spool).trial_ended(record)
    assert spool.ended == [
        (0, "completed", None, {"hiertune.attempts": "1"}),
        (1, "failed", "killed", {"hiertune.attempts": "4", "hiertune.fault": "crashed"}),
    ]
