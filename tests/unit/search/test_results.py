"""What is printed at the end can be typed."""

import io
import json
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from rich.console import Console

from hiertune.search import results
from hiertune.search.budget import Ending
from hiertune.search.ledger import TrialRecord
from hiertune.search.outputs import RunFolder, write_summary
from hiertune.search.winner import Comparison
from hiertune.tracking import Delivery


def plan(tmp_path, runs="runs", name="it", **given):
    return SimpleNamespace(
        folder=RunFolder(tmp_path / runs / name),
        config=SimpleNamespace(name=name),
        space=SimpleNamespace(file="my space.yaml", config=SimpleNamespace(name="it")),
        given=given,
        trials=8,
    )


@pytest.mark.parametrize(
    ("options", "instead", "command"),
    [
        ({}, {}, "hiertune search 'my space.yaml' --resume"),
        (
            {"runs": "else where"},
            {"trials": "8"},
            "hiertune search 'my space.yaml' --resume --runs 'else where' --trials 8",
        ),
        ({"name": "other"}, {}, "hiertune search 'my space.yaml' --resume --name other"),
        (
            {"trials": "8", "time-budget": "90m"},
            {},
            "hiertune search 'my space.yaml' --resume --trials 8 --time-budget 90m",
        ),
        (
            {"trials": "8", "time-budget": "90m"},
            {"trials": "16"},
            "hiertune search 'my space.yaml' --resume --trials 16 --time-budget 90m",
        ),
    ],
)
def test_the_command_that_resumes(tmp_path, monkeypatch, options, instead, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "as_typed", lambda name: name)
    assert results.resume_command(plan(tmp_path, **options), **instead) == command


@pytest.mark.parametrize(
    ("ending", "command"),
    [
        (Ending("trials", "", 8), "hiertune search 'my space.yaml' --resume --trials 16"),
        (Ending("time_budget", "", 5400.0), "hiertune search 'my space.yaml' --resume --time-budget 3h"),
        (
            Ending("worker_hours", "", 2.0),
            "hiertune search 'my space.yaml' --resume  # after raising search.worker_hours in my space.yaml",
        ),
    ],
)
def test_the_command_that_extends(tmp_path, monkeypatch, ending, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "as_typed", lambda name: name)
    assert results.extension(plan(tmp_path), ending) == command


def test_a_search_that_has_more_trials_than_were_asked_for_is_extended_beyond_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "as_typed", lambda name: name)
    asked = plan(tmp_path, trials="2")
    asked.trials, asked.tracking_uri = 2, "http://mlflow"
    summary = {
        "trials": {"completed": 9, "pruned": 3, "outside": 7},
        "ended": {"by": "trials", "reason": "", "limit": 2},
    }
    command = results.next_commands(asked, summary)["Extend the search"]
    assert command == "hiertune search 'my space.yaml' --resume --trials 24"


ENDED = [
    *(TrialRecord(number, "completed", {}, 0.5) for number in range(12)),
    *(TrialRecord(number, "pruned", {}, 0.5) for number in range(12, 16)),
    TrialRecord(16, "failed", {}, None),
]


def interrupted(*epochs):
    return [TrialRecord(17 + i, "running", {}, None, epochs=epoch) for i, epoch in enumerate(epochs)]


@pytest.mark.parametrize(
    ("records", "line"),
    [
        ([], "0 of 32 trials ended"),
        (ENDED, "17 of 32 trials ended (12 completed, 4 pruned, 1 failed)"),
        (
            ENDED + interrupted(9, 7),
            "17 of 32 trials ended (12 completed, 4 pruned, 1 failed), "
            "2 interrupted ones go on from epochs 7 and 9",
        ),
        (interrupted(3), "0 of 32 trials ended, 1 interrupted one goes on from epoch 3"),
        (interrupted(3, 3), "0 of 32 trials ended, 2 interrupted ones go on from epoch 3"),
        (
            interrupted(*range(9)),
            "0 of 32 trials ended, 9 interrupted ones go on from epochs 0 to 8",
        ),
    ],
)
def test_how_far_a_search_is(records, line):
    assert results.progress_line(records, 32) == line


@pytest.mark.parametrize(
    ("trials", "line"),
    [
        (20, "17 of 20 trials ended (12 completed, 4 pruned, 1 failed), {} go on from epochs 7 and 9"),
        (
            18,
            "17 of 18 trials ended (12 completed, 4 pruned, 1 failed), "
            "1 interrupted one goes on from epoch 9, 1 interrupted one is left",
        ),
        (17, "17 of 17 trials ended (12 completed, 4 pruned, 1 failed), {} are left"),
        (5, "17 trials ended (12 completed, 4 pruned, 1 failed), 5 were asked for, {} are left"),
    ],
)
def test_of_a_search_with_fewer_trials_to_have_the_first_interrupted_go_on(trials, line):
    records = ENDED + interrupted(9, 7)
    assert results.progress_line(records, trials) == line.format("2 interrupted ones")


def test_what_does_not_go_on_or_count_is_not_said_to():
    records = ENDED + interrupted(9, 7)
    line = "17 of 32 trials ended (12 completed, 4 pruned, 1 failed), 2 interrupted ones are left"
    assert results.progress_line(records, 32, goes_on=False) == line
    records = [TrialRecord(0, "outside", {}, 0.5), TrialRecord(1, "completed", {}, 0.5), *interrupted(3)]
    line = "1 of 2 trials ended (1 completed), 1 outside the space, 1 interrupted one goes on from epoch 3"
    assert results.progress_line(records, 2) == line


def test_a_search_that_ended_early_says_why():
    ended = {"by": "time_budget", "reason": "time budget of 2h spent: 17 of 32 trials", "limit": 7200.0}
    assert results.ended_line({"ended": ended}) == "time budget of 2h spent: 17 of 32 trials"
    assert results.ended_line({"ended": ended | {"by": "trials"}}) is None
    assert results.ended_line({}) is None, "of an older version"


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


@pytest.mark.parametrize(
    ("against", "expected"),
    [
        (
            (200, 0.021, 0.004, 0.038, 0.01),
            "+2.1 points (95% interval +0.4 to +3.8, n=200): [green]better[/]",
        ),
        ((1, None, None, None, None), "– (n=1, too few to compare)"),
        ((0, None, None, None, None), "– (n=0, too few to compare)"),
    ],
)
def test_the_verdict(against, expected):
    said = results._verdict("nearest_neighbour", asdict(Comparison(*against)))
    assert said == f"winner against nearest neighbour: {expected}"


def test_a_comparison_of_nothing_can_be_written(tmp_path):
    """What `summarise` makes of it is JSON, and read again as it was."""
    comparison = asdict(Comparison(0, None, None, None, None))
    write_summary(tmp_path / "summary.json", {"controls": {"flat": {"against_winner": comparison}}})
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["controls"]["flat"]["against_winner"] == comparison


def test_what_the_terminal_says_of_an_outage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "as_typed", lambda name: name)
    monkeypatch.setattr(time, "localtime", time.gmtime)
    assert results.delivery_line(Delivery(90, 100)) == "tracking: 90 of 100 points delivered"
    late = Delivery(90, 100, "http://host can't be reached", since=3723.0)
    assert results.delivery_line(late) == (
        "tracking: 90 of 100 points delivered; 10 wait since 01:02:03: http://host can't be reached"
    )
    run = tmp_path / "runs" / "it"
    assert results.delivered_line(Delivery(100, 100), run) == "100 of 100 points delivered"
    assert results.delivered_line(late, run) == (
        "90 of 100 points delivered (http://host can't be reached); "
        "`hiertune track sync it` delivers the rest"
    )
    elsewhere = results.delivered_line(Delivery(90, 100), tmp_path / "my runs" / "it")
    assert elsewhere.endswith("; `hiertune track sync it --runs 'my runs'` delivers the rest")
    refused = Delivery(90, 100, "refused for good: too long")
    assert results.delivered_line(refused, run) == "90 of 100 points delivered: refused for good: too long"


def test_metrics_keep_their_names_in_80_columns():
    """With five columns of numbers it is the headings that are folded."""
    metrics = dict.fromkeys(
        ["test/accuracy/phylum", "test/accuracy_seen/genus", "test/hierarchical_distance"], 0.5
    )
    labels = ("winner", "winner, decoded", "flat", "flat_crm", "nearest_neighbour")
    shown = Console(file=io.StringIO(), width=80)
    shown.print(results.test_table(dict.fromkeys(labels, metrics), ("phylum", "genus")))
    text = shown.file.getvalue()
    assert all(name.removeprefix("test/") in text for name in metrics), text
    assert text.count("0.5000") == len(labels) * len(metrics)
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
