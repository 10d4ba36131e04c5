"""A run folder and its mirror in storage: what a kill, an outage or another machine makes of it."""

import dataclasses
import json
import os
import shutil
import threading
import time
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hiertune.errors import InputError
from hiertune.search import mirror as module
from hiertune.search.mirror import Mirror, Part, Session, bring_back, parts_of, read_parts
from hiertune.search.outputs import RunFolder
from hiertune.storage import Folder, RemoteFolder


def create(run, space):
    run.root.mkdir(parents=True)
    run.space.write_text(space)


@pytest.fixture(params=["local", "s3"])
def storage(request, tmp_path):
    if request.param == "local":
        return Folder.at(tmp_path / "storage" / "search")
    return Folder.at(request.getfixturevalue("s3_folder")).child("search")


@pytest.fixture
def run(tmp_path, storage):
    folder = RunFolder(tmp_path / "here" / "search", storage)
    folder.root.parent.mkdir()
    create(folder, "name: search\n")
    return folder


@pytest.fixture
def elsewhere(tmp_path, storage):
    """The same search's folder on a machine that never saw it."""
    (tmp_path / "there").mkdir()
    return RunFolder(tmp_path / "there" / "search", storage)


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(module, "INTERVAL_S", 0.05)


def append(path, text):
    with path.open("a") as file:
        file.write(text)


def contents(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != ".session"
    }


# ---------------------------------------------------------------------------- there and back


def test_what_was_told_is_there_before_the_trial_counts(run, elsewhere):
    mirror = Mirror(run)
    for number in range(5):
        append(run.root / "tracking.jsonl", f"point {number}\n")
        append(run.curves, f"{number},1\n")
        append(run.ledger, f"told {number}\n")
        assert mirror.told()
        # The machine is gone: nothing of this process has a part in what follows.
        for name in ("tracking.jsonl", "curves.csv", "ledger.log"):
            stored = read_parts(run.storage.child(f"{name}.parts"))
            assert stored == (run.root / name).read_bytes()
    assert mirror.close() == []
    bring_back(elsewhere)
    assert contents(elsewhere.root) == contents(run.root)


def test_a_finished_search_comes_back_whole(run, elsewhere):
    mirror = Mirror(run)
    for name in ("trials.csv", "best.yaml", "report.html"):
        (run.root / name).write_text(name)
    run.summary.write_text(json.dumps({"winner": {"trial": 3}}))
    append(run.ledger, "told\n")
    for name in ("model/model.json", "controls/flat/model/model.json", "trials/0003/val_logits.safetensors"):
        run.storage.write_bytes(name, name.encode())  # as workers do
        (run.root / name).parent.mkdir(parents=True)
        (run.root / name).write_text(name)
    (run.root / "tracking.offset").write_text("of this machine")
    (run.root / ".ray").mkdir()
    assert mirror.close() == []
    (run.root / "tracking.offset").unlink()
    bring_back(elsewhere)
    assert contents(elsewhere.root) == contents(run.root)
    assert sorted(path.name for path in elsewhere.root.parent.iterdir()) == ["search"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(st.binary(min_size=1, max_size=40).map(lambda b: b.replace(b"://", b"")), max_size=12),
    data=st.data(),
)
def test_any_file_that_grows_comes_back_up_to_its_last_line(tmp_path, monkeypatch, pieces, data):
    monkeypatch.setattr(module, "PART_BYTES", 50)
    monkeypatch.setattr(module, "_MOST_BYTES", 70)
    root = tmp_path / str(time.time_ns())
    folder, path = Folder.at(root / "parts"), root / "file"
    root.mkdir()
    growing = module._Growing(path, folder)
    for piece in pieces:
        append_bytes(path, piece)
        if data.draw(st.booleans()):
            growing.send()
        if data.draw(st.booleans()):
            growing.tidy() if growing._superseded is not None else None
        if data.draw(st.booleans()):
            growing = module._Growing(path, folder)  # another session
    growing.send()
    written = path.read_bytes() if path.exists() else b""
    # A line longer than what is sent at once waits for more room: there is none in this test.
    stored = read_parts(folder)
    assert written.startswith(stored)
    if max((len(line) for line in written.split(b"\n")), default=0) < 70 - 50:
        assert stored == written[: written.rfind(b"\n") + 1]


def append_bytes(path, content):
    with path.open("ab") as file:
        file.write(content)


def test_parts_stay_few(run, monkeypatch):
    monkeypatch.setattr(module, "PART_BYTES", 1000)
    growing = module._Growing(run.ledger, run.storage.child("ledger.log.parts"))
    for number in range(100):
        append(run.ledger, f"{number:>49}\n")
        growing.send()
        growing.tidy()
    parts = parts_of(run.storage.child("ledger.log.parts"))
    assert [(part.begin, part.end) for part in parts] == [(i, i + 1000) for i in range(0, 5000, 1000)]


def test_torn_and_foreign_parts_are_left_out(run):
    folder = run.storage.child("ledger.log.parts")
    append(run.ledger, "one\ntwo\nthree\n")
    growing = module._Growing(run.ledger, folder)
    growing.send()
    whole = run.ledger.read_bytes()
    (kept,) = folder.names()
    folder.write_bytes(Part(0, 99, 5).name, b"shorter than its name says")
    folder.write_bytes(Part(0, 20, zlib.crc32(b"other")).name, b"x" * 20)  # a bit that tipped over
    folder.write_bytes(Part.of(50, b"after a gap").name, b"after a gap")
    folder.write_bytes("what is this", b"")
    assert read_parts(folder) == whole
    again = module._Growing(run.ledger, folder)
    again.send()
    again.tidy()
    assert folder.names() == [kept]


def test_a_new_life_replaces_the_parts_of_an_old_one(run):
    folder = run.storage.child("ledger.log.parts")
    append(run.ledger, "of the old life\n" * 3)
    module._Growing(run.ledger, folder).send()
    run.ledger.write_text("new\n")
    growing = module._Growing(run.ledger, folder)
    growing.send()
    growing.tidy()
    assert read_parts(folder) == b"new\n"
    run.ledger.write_text("x\n")  # cut and written anew under its eyes
    growing.send()
    growing.tidy()
    assert read_parts(folder) == b"x\n"


def test_passwords_stay_here(run):
    line = '{"op":"open","uri":"postgresql://me:hunter2@host/db","more":"http://me:hà/é2@host"}\n'
    append(run.root / "tracking.jsonl", line)
    mirror = Mirror(run)
    assert mirror.close() == []
    stored = read_parts(run.storage.child("tracking.jsonl.parts")).decode()
    assert stored == line.replace("hunter2", "*******").replace("hà/é2", "*" * len("hà/é2".encode()))


# -------------------------------------------------------------------------------- two machines


def foreign(session):
    """The session of a process on another machine."""
    return dataclasses.replace(
        session, machine="another", host="far", user="eve", pid=os.getpid(), id="x" * 32
    )


def test_a_search_that_runs_elsewhere_is_refused(run, elsewhere, monkeypatch):
    foreign(Session.new()).write(run.storage)
    with pytest.raises(InputError) as caught:
        bring_back(elsewhere)
    assert f"is being run by eve on far (process {os.getpid()}) since 20" in str(caught.value)
    with pytest.raises(InputError):
        Mirror(run)
    monkeypatch.setattr(module, "STALE_S", -1.0)  # it has been silent for long
    Mirror(run).close()
    assert run.storage.names() == ["session.json", "space.yaml"], "the question leaves nothing behind"


def test_an_ended_or_dead_session_is_taken_over_at_once(run):
    dataclasses.replace(foreign(Session.new()), ended=True).write(run.storage)
    Mirror(run).close()
    dataclasses.replace(Session.new(), pid=2**22 + 1).write(run.storage)  # no such process here
    Mirror(run).close()
    run.storage.write_bytes("session.json", b"{torn")
    Mirror(run).close()


def test_a_machine_that_slept_notices_that_it_was_overtaken(run, often, monkeypatch):
    monkeypatch.setattr(module, "BEAT_S", 0.0)
    asked = threading.Event()
    mirror = Mirror(run)
    mirror.when_overtaken = asked.set
    other = foreign(Session.new())
    deadline = time.monotonic() + 30
    while not asked.is_set() and time.monotonic() < deadline:
        other.write(run.storage)
        asked.wait(0.05)
    assert mirror.overtaken
    append(run.ledger, "too late\n")
    assert not mirror.told()
    mirror.close()
    assert read_parts(run.storage.child("ledger.log.parts")) == b""
    assert Session.read(run.storage) == other


def test_the_machine_that_is_behind_takes_what_the_other_did(run, elsewhere):
    append(run.ledger, "told here\n")
    Mirror(run).close()
    bring_back(elsewhere)
    append(elsewhere.ledger, "told there\n")
    append(elsewhere.curves, "there\n")
    Mirror(elsewhere).close()
    bring_back(run)
    assert run.ledger.read_text() == "told here\ntold there\n"
    assert run.curves.read_text() == "there\n"


def test_the_machine_that_is_ahead_keeps_what_it_has(run, elsewhere):
    append(run.ledger, "told\n")
    Mirror(run).close()
    append(run.ledger, "told while the store was away\n")
    (run.root / ".session").unlink()
    bring_back(run)
    assert run.ledger.read_text().endswith("away\n")
    Mirror(run).close()
    assert read_parts(run.storage.child("ledger.log.parts")) == run.ledger.read_bytes()


def test_two_ways_are_not_mixed(run, elsewhere):
    append(run.ledger, "told\n")
    Mirror(run).close()
    bring_back(elsewhere)
    append(elsewhere.ledger, "told there\n")
    Mirror(elsewhere).close()
    append(run.ledger, "told here\n")
    before = contents(run.root)
    with pytest.raises(InputError, match="each without the other"):
        bring_back(run)
    assert contents(run.root) == before


def test_a_search_that_has_storage_is_not_resumed_without(run):
    Mirror(run).close()
    with pytest.raises(InputError) as caught:
        bring_back(RunFolder(run.root))
    assert f"is kept in {run.storage} too" in str(caught.value)


def test_a_name_that_is_taken_in_storage_is_refused(run, elsewhere):
    Mirror(run).close()
    with pytest.raises(InputError, match="exists already"):
        elsewhere.require_new()
    with pytest.raises(InputError, match="nor in "):
        RunFolder(elsewhere.root.with_name("none"), Folder.at(f"{run.root}/none")).require_existing()


# ------------------------------------------------------------------------------------- outages


@pytest.fixture
def quick(monkeypatch):
    """Requests are given up soon."""
    real = module.Folder.at

    def at(address):
        folder = real(address)
        return RemoteFolder.open(str(folder), patient=False)

    return at


@pytest.mark.parametrize("fault", [500, 503, "hang", "cut"])
def test_an_outage_stops_nothing_and_is_made_up_for(faulty_s3, s3_folder, tmp_path, often, quick, fault):
    run = RunFolder(tmp_path / "search", quick(s3_folder))
    create(run, "name: search\n")
    said = []
    mirror = Mirror(run, said.append)
    append(run.ledger, "before\n")
    assert mirror.told(30)
    faulty_s3.break_with(fault)
    append(run.ledger, "during\n")
    assert not mirror.told(30)
    begun = time.monotonic()
    for _ in range(100):
        append(run.ledger, "more\n")
        mirror.told()
    assert time.monotonic() - begun < 5, "once it is known, nobody waits"
    assert len(said) == 1
    assert said[0].startswith("storage fails, the search goes on and sends what is missing later: ")
    assert "ledger.log" in mirror.close(0.2)
    faulty_s3.heal()
    mirror._thread.join(60)
    assert said[1:] == ["storage is back, and has everything"]
    assert read_parts(run.storage.child("ledger.log.parts")) == run.ledger.read_bytes()


# ------------------------------------------------------------------------------ what trials leave


def test_what_trials_leave_is_removed_but_for_logits(run, often):
    for number in range(4):
        for name in ("checkpoint", "checkpoint.other", "val_logits.safetensors"):
            run.storage.write_bytes(f"trials/{number:04d}/{name}", b"1")
    mirror = Mirror(run)
    for number in (0, 1, 2, 9):
        mirror.remove_trial(number) if number != 2 else mirror.keep_logits(2)
    assert mirror.close() == []
    left = [name for name in run.storage.sizes(deep=True) if name.startswith("trials/")]
    of_another = [
        f"trials/0003/{name}" for name in ("checkpoint", "checkpoint.other", "val_logits.safetensors")
    ]
    assert sorted(left) == ["trials/0002/val_logits.safetensors", *of_another]


def test_of_a_thousand_ended_trials_nothing_is_asked_one_by_one(faulty_s3, s3_folder, tmp_path):
    run = RunFolder(tmp_path / "search", Folder.at(s3_folder))
    create(run, "name: search\n")
    mirror = Mirror(run)
    faulty_s3.seen.clear()
    for number in range(1000):
        mirror.remove_trial(number)
    assert mirror.close() == []
    assert len(faulty_s3.seen) < 30


def test_fetching_is_all_or_nothing(run, elsewhere, monkeypatch):
    append(run.ledger, "told\n")
    Mirror(run).close()
    real = shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr(module, "_fetch_winners_logits", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            bring_back(elsewhere)
    assert not elsewhere.root.exists()
    bring_back(elsewhere)
    assert elsewhere.ledger.read_text() == "told\n"
    assert shutil.rmtree is real
    assert [path.name for path in elsewhere.root.parent.iterdir()] == ["search"]


def test_of_a_search_that_died_at_once_nothing_comes_back_and_its_name_is_free(storage, elsewhere):
    Session.new().write(storage)
    bring_back(elsewhere)
    assert not elsewhere.root.exists()
    elsewhere.require_new()
