"""Searches that are stopped, by a user or a budget: what they leave, and how they go on."""

import csv
import json
import signal
import time

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SPACE = """
name: small
data: {path: DATA}
model: {backbone: {kind: mlp, hidden: [16]}, head: {kind: linear}}
optimizer: {kind: adamw, lr: {loguniform: [1.0e-3, 1.0e-1]}}
train: {epochs: EPOCHS, batch_size: 50}
search: {max_concurrent: 1, controls: false, refit: false, scheduler: {kind: none}, SEARCH}
"""


@pytest.fixture
def space(tmp_path, data_file):
    def write(epochs, search):
        text = SPACE.replace("DATA", str(data_file)).replace("EPOCHS", str(epochs)).replace("SEARCH", search)
        (tmp_path / "space.yaml").write_text(text)
        return "space.yaml"

    return write


def rows_of(run):
    with (run / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def epochs_of(run):
    """Epochs of trial 0, as they were reported."""
    if not (run / "curves.csv").exists():
        return []
    with (run / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [int(row["epoch"]) for row in rows if (row["trial"], row["metric"]) == ("0", "train/loss")]


def wait_until(condition, process, timeout_s=240):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_search_stopped_at_once_then_by_command_then_by_its_budget(
    hiertune, start_hiertune, space, tmp_path
):
    run = tmp_path / "runs" / "small"
    file = space(100_000, "trials: 2")

    # Ctrl-C twice: nothing is waited for, nothing is left running.
    process = start_hiertune("search", file, "--trials", "3")
    wait_until(lambda: len(epochs_of(run)) >= 3, process)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert output.rstrip().splitlines()[-1].endswith("hiertune search space.yaml --resume --trials 3")
    _, left = psutil.wait_procs(started, timeout=30)
    assert left == []
    before = epochs_of(run)

    # It goes on, until another terminal asks for its end.
    process = start_hiertune("search", file, "--resume", "--trials", "3")
    wait_until(lambda: len(epochs_of(run)) >= len(before) + 3, process)
    stopped = hiertune("stop", "small", capture_output=True)
    assert stopped.returncode == 0, stopped.stderr
    assert "small has stopped; its trials: 1 interrupted; go on with:\n" in stopped.stdout
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    last = max(epochs_of(run))
    assert "resuming small: 0 of 3 trials ended, 1 interrupted one goes on from epoch" in output
    assert f"stopped: 0 of 3 trials ended, 1 interrupted one goes on from epoch {last}; go on" in output
    assert sorted(set(epochs_of(run))) == list(range(1, last + 1))
    assert [row["state"] for row in rows_of(run)] == ["interrupted"]
    again = hiertune("stop", "small", capture_output=True)
    assert again.returncode == 2
    assert "small is not running; it goes on with:" in again.stderr

    # With a budget that is spent already, there is nothing to wait for.
    failed = hiertune("search", file, "--resume", "--time-budget", "1", capture_output=True)
    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert (
        "no trial was completed: time budget of 1s spent; 0 of 2 trials ended, 1 interrupted one goes on"
        in failed.stderr
    )
    assert "hiertune search space.yaml --resume --time-budget 2s" in failed.stderr


@pytest.mark.long
def test_a_spent_budget_ends_a_search_with_its_winner(hiertune, space, tmp_path):
    run = tmp_path / "runs" / "small"
    file = space(3, "trials: 1000, worker_hours: 0.0002")
    done = hiertune("search", file, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows, summary = rows_of(run), json.loads((run / "summary.json").read_text())
    states = [row["state"] for row in rows]
    assert 1 <= len(rows) < 1000
    assert set(states) <= {"completed", "interrupted"}
    assert states.count("interrupted") <= 1
    assert summary["ended"]["by"] == "worker_hours"
    used = sum(float(row["epoch_seconds"] or 0) for row in rows)
    assert summary["ended"]["used"]["worker_seconds"] >= 0.7
    assert used > 0
    reason = f"budget of 0.0002 worker-hours spent: {states.count('completed')} of 1000 trials"
    assert summary["ended"]["reason"].startswith(reason)
    assert reason in done.stdout
    assert reason in (run / "report.html").read_text()

    # Unchanged it adds nothing and says it again; and so does another budget that is spent as well.
    for options in ((), ("--time-budget", "1")):
        again = hiertune("search", file, "--resume", *options, capture_output=True)
        assert again.returncode == 0, again.stderr
        assert reason in again.stdout
        assert rows_of(run) == rows
