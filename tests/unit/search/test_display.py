"""What the terminal says of a trial."""

import io

import pytest
from rich.console import Console

from hiertune.config import DataConfig, TrialConfig
from hiertune.search.display import Display
from hiertune.search.ledger import TrialRecord
from hiertune.search.outputs import write_trials

KILLED = {"fault": "crashed", "reason": "worker 2 of 2 was killed", "epoch": 1, "time": 1.5}
HUNG = {"fault": "hang", "reason": "no batch for 30 s at epoch 3 [1]", "epoch": 2, "time": 2.5}


@pytest.mark.parametrize(
    ("incidents", "words"),
    [
        ([], ""),
        ([KILLED], " (went on: worker 2 of 2 was killed)"),
        ([KILLED, HUNG], " (went on: 2 times, last no batch for 30 s at epoch 3 [1])"),
    ],
)
def test_the_line_of_a_trial_says_what_it_survived(incidents, words):
    out = io.StringIO()
    display = Display(Console(file=out, width=200), 3, "val/loss", "min", lambda: "")
    display.trial_ended(TrialRecord(0, "completed", {}, 0.5, epochs=3, seconds=1.5, incidents=incidents))
    assert out.getvalue().rstrip("\n") == f"\u2714 trial   0  0.5000    3 epochs    1.5 s  best so far{words}"


def test_the_table_of_trials_has_attempts_and_fault(tmp_path):
    records = [
        TrialRecord(0, "completed", {}, 0.5, incidents=[KILLED]),
        TrialRecord(1, "failed", {}, None, "killed", fault="crashed"),
    ]
    write_trials(tmp_path / "trials.csv", records)
    lines = (tmp_path / "trials.csv").read_text().splitlines()
    assert lines == [
        "trial,state,reason,fault,attempts,epochs,seconds,objective",
        "0,completed,,,2,0,0.0,0.5",
        "1,failed,killed,crashed,1,0,0.0,",
    ]


def test_a_dumb_terminal_gets_a_line_per_trial(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=True)
    assert console.is_terminal
    with Display(console, 1, "val/loss", "min", lambda: "") as display:
        display.trial_ended(TrialRecord(0, "completed", {}, 0.5, epochs=3, seconds=1.5))
        assert "trial   0  0.5000" in out.getvalue()


@pytest.mark.parametrize(("asked", "shown"), [(2, "3/3"), (5, "3/5")])
def test_the_bar_of_a_search_that_is_asked_for_fewer_trials_than_it_has_is_full(asked, shown):
    out = io.StringIO()
    display = Display(Console(file=out, width=200), asked, "val/loss", "min", lambda: "")
    display.resumed([TrialRecord(number, "completed", {}, 0.5) for number in range(3)])
    display._console.print(display._render())
    assert shown in out.getvalue()


def test_what_a_terminal_would_obey_is_written_out():
    out = io.StringIO()
    display = Display(Console(file=out, width=200), 3, "val/loss", "min", lambda: "")
    display.trial_ended(TrialRecord(0, "failed", {}, None, "no class \x1b]0;x", incidents=[]))
    told = KILLED | {"reason": "worker \x1b[2J"}
    display.trial_ended(TrialRecord(1, "completed", {}, 0.5, incidents=[told]))
    assert "\x1b" not in out.getvalue()
    assert r"no class \x1b]0;x" in out.getvalue()
    assert r"worker \x1b[2J" in out.getvalue()


def test_a_trial_that_waits_has_no_line_of_its_own():
    out, waiting = io.StringIO(), set()
    console = Console(file=out, width=200, height=40)
    config = TrialConfig(data=DataConfig(path="none.h5"))
    display = Display(console, 3, "val/loss", "min", lambda: "", waiting.__contains__)
    for number in range(3):
        display.trial_started(number, config, {})
    waiting |= {0, 2}
    console.print(display._render())
    lines = [line.strip() for line in out.getvalue().splitlines() if "trial " in line or "waiting" in line]
    assert [line.split("  ")[0] for line in lines] == ["\u25b8 trial", "2 waiting"]
    assert lines[0].split()[2] == "1"
