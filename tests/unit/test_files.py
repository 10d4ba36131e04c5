"""Files that appear when they are whole, and stay."""

import os

import pytest

from hiertune._files import replace_file


def test_a_loss_of_power_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    path, synced, fsync = tmp_path / "file", [], os.fsync
    path.write_text("old")

    def note(number):
        name = os.path.relpath(os.readlink(f"/proc/self/fd/{number}"), tmp_path)
        synced.append((name, path.read_text(), {each.name: each.read_text() for each in tmp_path.iterdir()}))
        fsync(number)

    monkeypatch.setattr("os.fsync", note)
    replace_file(path, "new")
    assert synced == [
        (".file.new", "old", {"file": "old", ".file.new": "new"}),
        (".", "new", {"file": "new"}),
    ]


@pytest.mark.parametrize(
    ("content", "written"), [("a\udcff", b"a\xff"), (b"\xff", b"\xff"), ("é\n", b"\xc3\xa9\n")]
)
def test_text_and_bytes(tmp_path, content, written):
    replace_file(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == written


def test_what_a_temporary_file_of_before_links_to_is_not_written(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in ("file", ".file.new"):
        (tmp_path / name).symlink_to(precious)
    replace_file(tmp_path / "file", "new")
    assert (precious.read_text(), (tmp_path / "file").read_text()) == ("mine", "new")
    assert not (tmp_path / "file").is_symlink()
