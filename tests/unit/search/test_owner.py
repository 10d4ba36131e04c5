"""One process at a time: the lock on a run folder, and the session in a database."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
from sqlalchemy.exc import OperationalError

from hiertune import _process
from hiertune._database import Place
from hiertune.errors import InputError
from hiertune.search import owner
from hiertune.search.ledger import Ledger, LedgerLost
from hiertune.search.outputs import RunFolder
from hiertune.search.owner import FolderLock, Ownership, Process


@pytest.fixture
def other():
    """`other(CODE)`: another process that has run CODE and lives on."""
    started = []

    def start(code):
        text = f"{code}\nprint('ready', flush=True)\nimport time\ntime.sleep(600)"
        process = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_folder_is_one_process_at_a_time_until_that_is_killed(tmp_path, other):
    process = other(
        "from pathlib import Path; from hiertune.search.outputs import RunFolder\n"
        "from hiertune.search.owner import FolderLock\n"
        f"lock = FolderLock(RunFolder(Path({str(tmp_path)!r}))); lock.__enter__()"
    )
    with (
        pytest.raises(InputError, match=rf"run by process {process.pid} on \S+, since 20\d\d-"),
        FolderLock(RunFolder(tmp_path)),
    ):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with FolderLock(RunFolder(tmp_path)):
        holder = json.loads((tmp_path / "search.owner").read_text())
        assert holder["pid"] == os.getpid()
    assert not (tmp_path / "search.owner").exists()


def test_a_request_to_stop_from_before_is_not_for_the_process_that_takes_the_folder(tmp_path):
    folder = RunFolder(tmp_path)
    folder.request.write_text("stop")
    with FolderLock(folder):
        assert not folder.request.exists()
        folder.request.write_text("stop")  # this one is
        with pytest.raises(InputError, match="being run by"), FolderLock(folder):
            pass
        assert folder.request.exists(), "nor is it another's to remove"


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request, tmp_path):
    if request.param == "sqlite":
        return Place(tmp_path / "ledger.log", f"sqlite:///{tmp_path}/ledger.db")
    return Place(tmp_path / "ledger.log", request.getfixturevalue("postgresql"))


def begin(place):
    return Ledger.open(place, "search", "max", resume=False)


def reopen(place):
    return Ledger.open(place, "search", "max", resume=True)


def written(ledger, process):
    """As if `process` had it."""
    ledger.storage.set_study_user_attr(ledger.first_id, owner.SESSION, asdict(process))


def test_a_database_is_one_process_at_a_time(place):
    with Ownership(begin(place)):
        with pytest.raises(InputError, match=rf"run by process {os.getpid()} on "), Ownership(reopen(place)):
            pass
        with pytest.raises(InputError, match="run by"), Ownership(reopen(place)):
            pass
    with Ownership(reopen(place)):
        pass


def test_a_dead_process_of_this_machine_is_taken_over_at_once(place, other):
    process = other("")
    ledger = begin(place)
    dead = replace(Process.new(), pid=process.pid, born=_process.born(process.pid))
    written(ledger, dead)
    with pytest.raises(InputError, match=f"run by process {process.pid} on"), Ownership(reopen(place)):
        pass
    process.kill()
    process.wait()
    with Ownership(reopen(place)):
        pass
    written(ledger, replace(Process.new(), born="1"))  # the number was given to another process
    with Ownership(reopen(place)):
        pass


def test_of_another_machine_a_beat_tells(place, monkeypatch):
    monkeypatch.setattr(owner, "SILENT_S", 1.5)
    monkeypatch.setattr(owner, "_LOOK_S", 0.05)
    ledger = begin(place)
    far = replace(Process.new(), host="far", machine="elsewhere")

    class Beating(Ownership):
        def _read(self, storage):  # the other one tells that it is alive while we look
            written(ledger, replace(far, beat=time.time()))
            return super()._read(storage)

    with pytest.raises(InputError, match=r"run by process \d+ on far, since"), Beating(reopen(place)):
        pass
    written(ledger, far)  # silent from now on
    begun = time.monotonic()
    with Ownership(reopen(place)):
        assert time.monotonic() - begun >= 1.5
    written(ledger, replace(far, beat=time.time() - 2 * owner.LONG_SILENT_S))
    monkeypatch.setattr(owner, "SILENT_S", 1000.0)
    with Ownership(reopen(place)):
        pass


def test_whoever_was_taken_over_writes_nothing_more(place, monkeypatch):
    monkeypatch.setattr(owner, "BEAT_S", 0.05)
    ledger = begin(place)
    with Ownership(ledger):
        trial = ledger.next_trial()
        trial.suggest_float("x", 0.0, 1.0)
        ledger.report(trial, 1, 0.5)
        written(ledger, replace(Process.new(), host="far", pid=7))
        deadline = time.monotonic() + 60
        while ledger.lost is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(LedgerLost, match="another process took it over: process 7 on far"):
            ledger.report(trial, 2, 0.6)
    assert reopen(place).epochs() == {0: {1: 0.5}}


def test_whoever_was_silent_for_long_looks_before_it_writes(place, monkeypatch):
    monkeypatch.setattr(owner, "BEAT_S", 1000.0)
    ledger = begin(place)
    with Ownership(ledger):
        trial = ledger.next_trial()
        trial.suggest_float("x", 0.0, 1.0)
        monkeypatch.setattr(owner, "SILENT_S", 0.0)  # as after the machine slept
        ledger.report(trial, 1, 0.5)
        ledger.storage.set_study_user_attr(ledger.first_id, owner.SESSION, None)  # taken over, and ended
        with pytest.raises(LedgerLost, match="another process took it over: one that has ended"):
            ledger.report(trial, 2, 0.6)
    assert reopen(place).epochs() == {0: {1: 0.5}}


def test_a_beat_whose_answer_was_lost_is_its_own(place, monkeypatch):
    monkeypatch.setattr(owner, "BEAT_S", 1000.0)
    ledger = begin(place)
    with Ownership(ledger) as ownership:
        written(ledger, replace(ownership._me, beat=time.time()))
        for _ in range(2):
            ownership._tell()
        assert ledger.lost is None
    with Ownership(reopen(place)):
        pass


def test_a_database_that_is_away_at_the_end_costs_no_result(place, monkeypatch):
    ledger = begin(place)
    with monkeypatch.context() as context, Ownership(ledger) as ownership:

        def away(*args):
            raise OperationalError("update", {}, Exception("connection refused"))

        context.setattr(ownership, "_replace", away)
    written(ledger, replace(Process.new(), born="1"))  # it is gone
    with Ownership(reopen(place)):
        pass


def test_a_revision_keeps_the_session(place, monkeypatch):
    monkeypatch.setattr(owner, "BEAT_S", 0.02)
    ledger = begin(place)
    with Ownership(ledger):
        for text in "bcd":
            ledger.revise(text, lambda frozen, record: frozen)
            time.sleep(0.1)
        assert ledger.lost is None
        with pytest.raises(InputError, match="run by"), Ownership(reopen(place)):
            pass
    with Ownership(reopen(place)) as _:
        pass
