from __future__ import annotations

import errno
import os

import pytest
import torch

from hiertune.errors import InputError
from hiertune.train import checkpoint as module
from hiertune.train.checkpoint import (
    CheckpointClock,
    decode_checkpoint,
    read_checkpoint,
    remove_checkpoint,
    save_checkpoint,
)


def read(path):
    payload, _ = read_checkpoint(path)
    return None if payload is None else decode_checkpoint(payload)


def note(path):
    return read_checkpoint(path)[1]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "trial" / "checkpoint"
    save_checkpoint(path, {"epoch": 1, "tensor": torch.arange(1000.0)})
    save_checkpoint(path, {"epoch": 2, "tensor": torch.arange(1000.0)})
    return path


def test_newest_comes_back(path):
    state = read(path)
    assert state["epoch"] == 2
    assert note(path) is None
    assert torch.equal(state["tensor"], torch.arange(1000.0))


def test_without_one_there_is_none(tmp_path):
    assert read_checkpoint(tmp_path / "nothing") == (None, None)


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty", "another file"])
def test_falls_back_to_the_one_before(path, damage):
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "truncated": content[:-7],
            "one bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "empty": b"",
            "another file": b"x" * len(content),
        }[damage]
    )
    assert read(path)["epoch"] == 1
    assert note(path) == f"the checkpoint {path} is damaged: the one before it is used"


def test_none_if_all_are_damaged(path):
    for file in path.parent.iterdir():
        file.write_bytes(b"")
    assert read_checkpoint(path) == (
        None,
        f"the checkpoint {path}.previous is damaged, and there is no other: training starts anew",
    )


def test_one_that_cannot_be_read_is_damaged(path):
    path.unlink()
    path.mkdir()
    assert read(path)["epoch"] == 1
    assert note(path) == f"the checkpoint {path} is damaged: the one before it is used"


def test_a_disk_that_is_full_leaves_both_and_no_half_of_a_third(path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(path, {"epoch": 3})
    assert read(path)["epoch"] == 2
    assert sorted(file.name for file in path.parent.iterdir()) == ["checkpoint", "checkpoint.previous"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_kill_while_saving_loses_nothing(path, monkeypatch, call):
    """Whichever call of `save_checkpoint` is its last, a whole checkpoint remains."""
    real, calls = getattr(os, call), 0

    def killing(survivors):
        def run(*args):
            nonlocal calls
            calls += 1
            if calls > survivors:
                raise KeyboardInterrupt
            return real(*args)

        return run

    for survivors in range(2):
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(module.os, call, killing(survivors))
            with pytest.raises(KeyboardInterrupt):
                save_checkpoint(path, {"epoch": 3})
        assert read(path)["epoch"] in (2, 3)


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def test_a_checkpoint_cannot_run_code(tmp_path):
    save_checkpoint(tmp_path / "evil", {"state": Evil()})
    payload, _ = read_checkpoint(tmp_path / "evil")
    assert payload is not None
    with pytest.raises(InputError):
        decode_checkpoint(payload)


def test_remove_leaves_nothing(path):
    path.with_name(path.name + ".new").write_bytes(b"unfinished")
    remove_checkpoint(path)
    assert list(path.parent.iterdir()) == []


def test_the_clock_keeps_the_cost_at_a_twentieth(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    cost = 3.0

    def slow_save(path, state):
        now[0] += cost

    monkeypatch.setattr(module, "save_checkpoint", slow_save)
    clock = CheckpointClock()
    now[0] += 0.9
    assert not clock.due()
    now[0] += 0.2
    assert clock.due()
    clock.save(tmp_path, {})
    now[0] += 59.0
    assert not clock.due()
    now[0] += 1.1
    assert clock.due()
