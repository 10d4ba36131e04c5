"""What is printed at the end can be typed."""

from types import SimpleNamespace

import pytest

from hiertune.search import results
from hiertune.search.ledger import TrialRecord
from hiertune.search.outputs import RunFolder


def plan(tmp_path, runs="runs", name="it"):
    return SimpleNamespace(
        folder=RunFolder(tmp_path / runs / name),
        config=SimpleNamespace(name=name),
        space=SimpleNamespace(file="my space.yaml", config=SimpleNamespace(name="it")),
    )


@pytest.mark.parametrize(
    ("options", "trials", "command"),
    [
        ({}, None, "hiertune search 'my space.yaml' --resume"),
        (
            {"runs": "else where"},
            8,
            "hiertune search 'my space.yaml' --resume --runs 'else where' --trials 8",
        ),
        ({"name": "other"}, None, "hiertune search 'my space.yaml' --resume --name other"),
    ],
)
def test_the_command_that_resumes(tmp_path, monkeypatch, options, trials, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "as_typed", lambda name: name)
    assert results.resume_command(plan(tmp_path, **options), trials) == command


def test_the_leaderboard_has_completed_trials_from_the_best_on():
    records = [
        TrialRecord(0, "completed", {"a.x": 1.0, "a.kind": "b"}, 0.5),
        TrialRecord(1, "pruned", {"a.x": 2.0, "a.kind": "b"}, 0.9),
        TrialRecord(2, "completed", {"a.x": 3.0, "a.kind": "b"}, 0.7),
        TrialRecord(3, "failed", {}, None),
    ]
    table = results.leaderboard(records, "val/accuracy/genus", "max")
    assert list(table.columns[1].cells) == ["2", "0"]
    assert list(table.columns[2].cells) == ["0.7000", "0.5000"]
    # Only what differs between them is shown, by the shortest name that tells it apart.
    assert list(table.columns[3].cells) == ["[dim]x[/]\N{NO-BREAK SPACE}3", "[dim]x[/]\N{NO-BREAK SPACE}1"]
    smallest = results.leaderboard(records, "val/loss", "min")
    assert list(smallest.columns[1].cells) == ["0", "2"]
