"""The spool and its two ends' bookkeeping, without a delivery process."""

import errno
import io
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from hiertune.errors import InputError
from hiertune.tracking import Delivery, Tracker, delivery, sync, tracker
from hiertune.tracking.spool import SPOOL, STATE, State, parse, read_lines, summarise

PLACE = {"uri": "http://host", "experiment": "hiertune", "search_name": "s1"}


class Process:
    """Stands for the delivery process: `code` is its exit code, None while it runs."""

    def __init__(self):
        self.code = None
        self.killed = False
        self.stdin = io.BytesIO()

    def poll(self):
        return self.code

    def wait(self, timeout=None):
        if self.code is None and not self.killed:
            raise subprocess.TimeoutExpired("deliver", timeout)
        return self.code

    def kill(self):
        self.killed = True


@pytest.fixture
def processes(monkeypatch):
    launched = []
    monkeypatch.setattr(tracker, "STARTUP", 0.0)
    monkeypatch.setattr(tracker, "launch_delivery", lambda *_: launched.append(Process()) or launched[-1])
    return launched


@pytest.fixture
def started(tmp_path, processes):
    tracked = Tracker.start(tmp_path, **PLACE)
    yield tracked
    tracked.close(0)


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / SPOOL).read_text().splitlines() if line]


def test_every_call_is_one_line_at_once(tmp_path, started):
    started.search_started({"a": 1}, {"hiertune.data": "x"})
    started.trial_started(3, {"lr": 0.1, "b": np.int64(2)})
    started.log(3, 1, {"val/loss": np.float32(0.5), "val/nan": math.nan}, timestamp=12.3456)
    started.trial_ended(3, "failed", "loss is nan")
    started.artifact(None, tmp_path / "best.yaml", "config")
    started.search_ended("completed", {"test/accuracy": 1.0}, {"winner": 3})
    records = lines(tmp_path)
    assert [record["op"] for record in records] == [
        "open",
        "start",
        "start",
        "log",
        "end",
        "artifact",
        "log",
        "end",
    ]
    assert [record["n"] for record in records] == [0, 3, 6, 8, 10, 11, 12, 14]
    assert [record["trial"] for record in records] == [None, None, 3, 3, 3, None, None, None]
    opened, _, trial, log, end, artifact, _, _ = records
    assert (opened["uri"], opened["experiment"], opened["search"]) == ("http://host", "hiertune", "s1")
    assert trial["params"] == {"lr": 0.1, "b": "2"}
    assert (log["t"], log["step"], log["metrics"]["val/loss"]) == (12346, 1, 0.5)
    assert math.isnan(log["metrics"]["val/nan"])
    assert (end["state"], end["tags"]) == ("failed", {"hiertune.reason": "loss is nan"})
    assert (artifact["path"], artifact["artifact_path"]) == ("best.yaml", "config")
    assert started.status() == Delivery(0, 14)
    assert abs(records[-1]["t"] / 1000 - time.time()) < 60


def test_the_spool_is_for_its_owner_only(tmp_path, started):
    assert (tmp_path / SPOOL).stat().st_mode & 0o777 == 0o600


def test_files_elsewhere_keep_their_whole_path(tmp_path, started):
    started.artifact(None, "/somewhere/else.txt")
    assert lines(tmp_path)[-1]["path"] == "/somewhere/else.txt"


def test_threads_share_a_tracker(tmp_path, started):
    def work(trial):
        for step in range(200):
            started.log(trial, step, {"a": 1.0, "b": 2.0})

    threads = [threading.Thread(target=work, args=[trial]) for trial in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = lines(tmp_path)[1:]
    assert [record["n"] for record in records] == list(range(2, 1602, 2))
    for trial in range(4):
        steps = [record["step"] for record in records if record["trial"] == trial]
        assert steps == list(range(200))


def test_a_spool_is_never_started_over(tmp_path, started):
    with pytest.raises(FileExistsError):
        Tracker.start(tmp_path, **PLACE)


def test_resume_goes_on_in_the_same_spool(tmp_path, processes):
    first = Tracker.start(tmp_path, **PLACE)
    first.log(0, 1, {"a": 1.0, "b": 1.0})
    uid = lines(tmp_path)[0]["uid"]
    first.close(0)
    with (tmp_path / SPOOL).open("ab") as file:
        file.write(b'{"op":"log","t":1,"trial":0,"metr')  # the search was killed in mid-write
    second = Tracker.start(tmp_path, **{**PLACE, "uri": "http://new"}, resume=True)
    second.log(0, 2, {"a": 1.0})
    second.close(0)
    records = lines(tmp_path)
    assert [record["op"] for record in records] == ["open", "log", "close", "open", "log", "close"]
    assert {record["uid"] for record in records if record["op"] == "open"} == {uid}
    assert summarise(tmp_path).header["uri"] == "http://new"
    assert delivery(tmp_path) == Delivery(0, 3)


def test_resume_without_a_spool_starts_one(tmp_path, processes):
    Tracker.start(tmp_path, **PLACE, resume=True).close(0)
    assert summarise(tmp_path).closed


def test_a_full_disk_is_told_and_does_not_stop_training(tmp_path, started, monkeypatch):
    started.log(0, 1, {"a": 1.0})
    write = os.write

    def full(file, data):
        write(file, data[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    started.log(0, 2, {"a": 1.0, "b": 1.0})
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:30]))
    started.log(0, 3, {"a": 1.0})
    monkeypatch.setattr(os, "write", write)
    started.log(0, 4, {"a": 1.0})
    status = started.status()
    assert status.total == 5
    assert "disk full" in status.error
    whole = [parse(line) for line in (tmp_path / SPOOL).read_bytes().splitlines()]
    assert [record["step"] for record in whole if record and record["op"] == "log"] == [1, 4]
    assert summarise(tmp_path).total == 2  # what can be delivered at all


def test_close_waits_no_longer_than_it_may(tmp_path, processes):
    tracked = Tracker.start(tmp_path, **PLACE)
    tracked.log(0, 1, {"a": 1.0})
    gone = Delivery(0, 1, "no answer from http://host in time")
    assert tracked.close(0.01) == gone
    assert processes[0].killed
    assert processes[0].stdin.closed, "how delivery hears of it"
    assert tracked.close(0.01) == gone
    assert [record["op"] for record in lines(tmp_path)] == ["open", "log", "close"]


def test_a_dead_delivery_is_told_and_started_again(tmp_path, processes, monkeypatch):
    tracked = Tracker.start(tmp_path, **PLACE)
    tracked.log(0, 1, {"a": 1.0})
    processes[0].code = -9
    assert "ended with code -9" in tracked.status().error
    assert len(processes) == 1  # not at once: it may die each time
    monkeypatch.setattr(tracker, "RESTART_AFTER", -1.0)
    tracked.status()
    assert len(processes) == 2
    assert tracked.status() == Delivery(0, 1)
    tracked.close(0)
    processes[1].code = 1
    tracked.status()
    assert len(processes) == 2  # a closed tracker starts nothing


def test_close_gives_a_dead_delivery_one_more_try(tmp_path, processes):
    tracked = Tracker.start(tmp_path, **PLACE)
    processes[0].code = 1
    tracked.close(0)
    assert len(processes) == 2


def test_state_survives_and_a_torn_one_is_as_none(tmp_path):
    state = State("hash", "http://host", 120, 17, 2, "answers 500", 99.5, {"": "a", "0": "b"})
    state.save(tmp_path)
    assert State.load(tmp_path) == state
    assert state.progress(20) == Delivery(15, 20, "answers 500", 99.5)
    whole = (tmp_path / STATE).read_text()
    for torn in (whole[:40], "", "[]", '{"unknown": 1}', "null"):
        (tmp_path / STATE).write_text(torn)
        assert State.load(tmp_path) == State()


def test_lines_are_read_whole_however_they_fall(tmp_path):
    written = [b"x" * size + b"\n" for size in (3, 30, 0, 9, 10, 11)]
    (tmp_path / "spool").write_bytes(b"".join(written) + b"torn")
    offset, read = 0, []
    while data := read_lines(tmp_path / "spool", offset, 10):
        assert data.endswith(b"\n")
        read += data.splitlines(keepends=True)
        offset += len(data)
    assert read == written


def test_summary_names_the_open_runs(tmp_path, started):
    started.search_started({})
    for trial in range(3):
        started.trial_started(trial, {})
    started.trial_ended(1, "pruned")
    assert summarise(tmp_path).open_runs == (None, 0, 2)
    assert not summarise(tmp_path).closed


def test_sync_needs_a_spool(tmp_path):
    with pytest.raises(InputError, match="nothing was tracked here"):
        sync(tmp_path)


def test_importing_tracking_imports_no_mlflow_and_no_torch():
    code = "import sys, hiertune.tracking; print([m for m in ('mlflow', 'torch', 'ray') if m in sys.modules])"
    root = Path(tracker.__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"
