from __future__ import annotations

import errno
import os
import threading

import pytest
import torch

from hiertune import storage
from hiertune.errors import InputError
from hiertune.train import checkpoint as module
from hiertune.train.checkpoint import Checkpoint, CheckpointClock, decode_checkpoint, encode_checkpoint


def save(path, state):
    Checkpoint(path).save(encode_checkpoint(state))


def read(path):
    payload, _ = Checkpoint(path).read()
    return None if payload is None else decode_checkpoint(payload)


@pytest.fixture(params=["local", "s3"])
def path(request, tmp_path):
    """The address of a trial's checkpoint, of which there were two."""
    place = tmp_path if request.param == "local" else request.getfixturevalue("s3_folder")
    path = f"{place}/trial/checkpoint"
    save(path, {"epoch": 1, "tensor": torch.arange(1000.0)})
    save(path, {"epoch": 2, "tensor": torch.arange(1000.0)})
    return path


def files(path):
    """The folder, and the newer and the older of its files."""
    folder, name = storage.Folder.of_file(path)
    newest, other = sorted(folder.names(), key=lambda name: -folder.read_bytes(name)[len(module._MAGIC) + 7])
    assert {newest, other} == {name, f"{name}.other"}
    return folder, newest, other


def test_newest_comes_back(path):
    state = read(path)
    assert state["epoch"] == 2
    assert Checkpoint(path).read()[1] is None
    assert torch.equal(state["tensor"], torch.arange(1000.0))


def test_without_one_there_is_none(tmp_path):
    assert read(tmp_path / "nothing") is None


def test_two_files_take_turns(path):
    folder, newest, other = files(path)
    kept = folder.read_bytes(newest)
    checkpoint = Checkpoint(path)
    checkpoint.save(b"3")
    assert folder.read_bytes(newest) == kept, "the one before stays as it is"
    checkpoint._last = (254, newest)
    for epoch in range(255, 258):  # numbers need more than one byte
        checkpoint.save(b"%d" % epoch)
        assert Checkpoint(path).read() == (b"%d" % epoch, None)
    assert folder.names() == sorted([newest, other])


@pytest.mark.parametrize("number", [0, 3, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1])
@pytest.mark.parametrize("damaged", [1, 2])
def test_any_number_in_a_damaged_file_leaves_room_for_the_next(tmp_path, number, damaged):
    path = tmp_path / "checkpoint"
    save(path, {"epoch": 1})
    save(path, {"epoch": 2})
    folder, *names = files(path)
    counted = slice(len(module._MAGIC), len(module._MAGIC) + 8)
    for name in names[:damaged]:
        content = bytearray(folder.read_bytes(name))
        content[counted] = number.to_bytes(8, "big")
        folder.write_bytes(name, bytes(content))
    assert read(path) == ({"epoch": 1} if damaged == 1 else None)
    for reads in (True, False, False):  # as a trial that goes on does first
        checkpoint = Checkpoint(path)
        if reads:
            checkpoint.read()
        for epoch in range(3, 6):
            checkpoint.save(encode_checkpoint({"epoch": epoch}))
            assert read(path) == {"epoch": epoch}


@pytest.mark.parametrize("damage", ["truncated", "one bit", "number", "empty", "another file"])
def test_falls_back_to_the_one_before(path, damage):
    folder, newest, other = files(path)
    content = folder.read_bytes(newest)
    middle, number = len(content) // 2, len(module._MAGIC) + 7
    broken = {
        "truncated": content[:-7],
        "one bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "number": content[:number] + bytes([content[number] ^ 4]) + content[number + 1 :],
        "empty": b"",
        "another file": b"x" * len(content),
    }[damage]
    folder.write_bytes(newest, broken)
    checkpoint = Checkpoint(path)
    payload, note = checkpoint.read()
    assert payload is not None
    assert decode_checkpoint(payload)["epoch"] == 1
    assert note == f"the checkpoint {folder.child(newest)} is damaged: the one before it is used"
    checkpoint.save(encode_checkpoint({"epoch": 3}))
    assert read(path)["epoch"] == 3
    assert other in folder.names()


def test_after_a_damaged_one_the_good_one_is_not_overwritten(path):
    folder, newest, other = files(path)
    good = folder.read_bytes(other)
    folder.write_bytes(newest, folder.read_bytes(newest)[:-7])
    checkpoint = Checkpoint(path)
    checkpoint.read()
    checkpoint.save(encode_checkpoint({"epoch": 3}))
    assert folder.read_bytes(other) == good


def test_none_if_all_are_damaged(path):
    folder, *names = files(path)
    for name in names:
        folder.write_bytes(name, b"")
    payload, note = Checkpoint(path).read()
    assert payload is None
    assert note.endswith(" is damaged, and there is no other: training starts anew")


def test_one_that_cannot_be_read_is_damaged(tmp_path):
    path = tmp_path / "checkpoint"
    save(path, {"epoch": 1})
    (tmp_path / "checkpoint.other").mkdir()
    assert read(path)["epoch"] == 1


def test_a_disk_that_is_full_leaves_both_and_no_half_of_a_third(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint"
    save(path, {"epoch": 1})
    save(path, {"epoch": 2})

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            save(path, {"epoch": 3})
    assert read(path)["epoch"] == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint", "checkpoint.other"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_kill_while_saving_loses_nothing(tmp_path, monkeypatch, call):
    """Whichever call of `save` is its last, a whole checkpoint remains."""
    path = tmp_path / "checkpoint"
    save(path, {"epoch": 1})
    save(path, {"epoch": 2})
    real, calls = getattr(os, call), 0

    def killing(survivors):
        def run(*args):
            nonlocal calls
            calls += 1
            if calls > survivors:
                raise KeyboardInterrupt
            return real(*args)

        return run

    for survivors in range(2 if call == "fsync" else 1):
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(storage.os, call, killing(survivors))
            with pytest.raises(KeyboardInterrupt):
                save(path, {"epoch": 3})
        assert read(path)["epoch"] in (2, 3)


def test_a_kill_at_any_byte_loses_nothing(tmp_path):
    """What is written of the new file has no part in what is read, until it has its name."""
    path = tmp_path / "checkpoint"
    save(path, {"epoch": 1})
    save(path, {"epoch": 2})
    older = tmp_path / "checkpoint"
    new = older.read_bytes()
    for size in range(0, len(new), 37):
        (tmp_path / "checkpoint.new").write_bytes(new[:size])
        assert read(path)["epoch"] == 2


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def test_a_checkpoint_cannot_run_code(tmp_path):
    save(tmp_path / "evil", {"state": Evil()})
    payload, _ = Checkpoint(tmp_path / "evil").read()
    assert payload is not None
    with pytest.raises(InputError):
        decode_checkpoint(payload)


@pytest.mark.parametrize("payload", [b"", b".", b"0", b"J\0", b"\x80\x02X\xff\xff\xff\xff", b"PK\x03\x04"])
def test_what_torch_cannot_unpickle_is_an_input_error(payload):
    with pytest.raises(InputError, match=r"^the checkpoint can't be read: ."):
        decode_checkpoint(payload)


def test_remove_leaves_nothing(path):
    Checkpoint(path).remove()
    assert storage.Folder.of_file(path)[0].names() == []


def test_remove_takes_unfinished_ones_too(tmp_path):
    (tmp_path / "checkpoint.77-1.new").write_bytes(b"unfinished")
    Checkpoint(tmp_path / "checkpoint").remove()
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------- the clock


class Slow:
    """A checkpoint in a place where saving takes `cost` seconds."""

    def __init__(self, now, cost, local=True):
        self.now, self.cost, self.local = now, cost, local
        self.saved = []
        self.gate = threading.Event()
        self.gate.set()

    def save(self, content):
        self.gate.wait(60)
        self.now[0] += self.cost
        if self.cost == 13:
            raise OSError("no such place")
        self.saved.append(decode_checkpoint(content))


@pytest.fixture
def now(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_the_clock_keeps_the_cost_at_a_twentieth(now):
    clock = CheckpointClock(Slow(now, 3.0))
    now[0] += 0.9
    assert not clock.due()
    now[0] += 0.2
    assert clock.due()
    clock.save({"epoch": 1})
    now[0] += 59.0
    assert not clock.due()
    now[0] += 1.1
    assert clock.due()


def test_training_does_not_wait_for_a_place_far_away(now):
    place = Slow(now, 3.0, local=False)
    state = {"epoch": 1, "weight": torch.zeros(3)}
    with CheckpointClock(place) as clock:
        place.gate.clear()
        clock.save(state)
        state["weight"] += 1  # training goes on
        now[0] += 1000
        assert not clock.due(), "one at a time"
        assert place.saved == []
        place.gate.set()
        clock.save(state, wait=True)
        assert [int(saved["weight"][0]) for saved in place.saved] == [0, 1]
        now[0] += 59.0
        assert not clock.due()
        now[0] += 1.1
        assert clock.due()
        place.gate.clear()
        clock.save({"epoch": 2, "weight": torch.full((3,), 2.0)})
        place.gate.set()
    assert int(place.saved[-1]["weight"][0]) == 2, "nothing is on its way once the trial is over"


@pytest.mark.parametrize("local", [True, False])
def test_a_place_that_fails_is_noted_once_and_stops_nothing(now, local):
    place = Slow(now, 13, local)
    with CheckpointClock(place) as clock:
        clock.save({"epoch": 3}, wait=True)
        clock.save({"epoch": 4}, wait=True)
        assert clock.notes() == ("checkpoint of epoch 3 could not be saved: no such place",)
        now[0] += 20 * 13 - 1
        assert not clock.due(), "what fails is not tried at every epoch"
        now[0] += 2
        assert clock.due()
        place.cost = 1
        clock.save({"epoch": 5}, wait=True)
        assert clock.notes() == ()
    assert place.saved == [{"epoch": 5}]
