"""`hiertune stop`, against a thread that behaves as a running search."""

import io
import threading
import time

import filelock
import pytest
from rich.console import Console

from hiertune.errors import InputError
from hiertune.search.outputs import RunFolder
from hiertune.search.stop import stop_search, write_command

TRIALS = "trial,state\n0,completed\n1,completed\n2,pruned\n3,interrupted\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(tmp_path / "runs" / "it")
    folder.root.mkdir(parents=True)
    folder.space.write_text("name: it\n")
    write_command(folder, "hiertune search it.yaml --resume --trials 8")
    return folder


def stop(folder, now=False):
    out = io.StringIO()
    stop_search(folder.root, now, Console(file=out, width=200))
    return out.getvalue()


@pytest.fixture
def running(folder):
    """The search runs until it is asked to stop; then it ends as `end` says. What it was asked is kept."""
    asked, has_begun = [], threading.Event()

    def start(end):
        def run():
            with filelock.FileLock(folder.lock):
                has_begun.set()
                deadline = time.monotonic() + 30
                while not folder.request.exists() and time.monotonic() < deadline:
                    time.sleep(0.01)
                asked.append(folder.request.read_text())
                folder.request.unlink()
                end()

        thread = threading.Thread(target=run)
        thread.start()
        has_begun.wait()
        return asked

    return start


@pytest.mark.parametrize(("now", "request_"), [(False, "stop"), (True, "now")])
def test_it_waits_until_the_search_has_stopped_and_says_how_far_it_got(folder, running, now, request_):
    def end():
        time.sleep(0.5)
        folder.trials.write_text(TRIALS)

    asked = running(end)
    assert stop(folder, now) == (
        "it has stopped; its trials: 2 completed, 1 pruned, 1 interrupted; go on with:\n"
        "  hiertune search it.yaml --resume --trials 8\n"
    )
    assert asked == [request_]


def test_the_command_says_where_it_is_to_be_typed(folder, running, tmp_path, monkeypatch):
    running(lambda: None)
    (tmp_path / "else where").mkdir()
    monkeypatch.chdir(tmp_path / "else where")
    assert stop(folder) == (
        "it has stopped; its trials: none was begun; go on with:\n"
        f"  cd {tmp_path} && hiertune search it.yaml --resume --trials 8\n"
    )


def test_a_search_that_came_to_its_end_meanwhile(folder, running):
    def end():
        folder.trials.write_text("trial,state\n0,completed\n")
        folder.summary.write_text("{}")

    running(end)
    assert stop(folder) == "it has come to its end; its trials: 1 completed\n"


def test_a_search_that_has_come_to_its_end_is_said_to_have(folder):
    folder.trials.write_text("trial,state\n0,completed\n")
    folder.summary.write_text("{}")
    with pytest.raises(InputError, match=r"it is not running; it has come to its end$"):
        stop(folder)
    assert not folder.request.exists()


def test_a_search_that_does_not_run_is_not_asked(folder):
    with pytest.raises(InputError, match="it is not running; it goes on with:") as refused:
        stop(folder)
    assert "\n  hiertune search it.yaml --resume --trials 8" in str(refused.value)
    assert not folder.request.exists()


def test_a_search_in_a_folder_that_can_not_be_written(folder):
    folder.lock.mkdir()  # stands for another user's
    with pytest.raises(InputError, match=r"runs/it: can't be asked: Is a directory\n  allowed: stop it as"):
        stop(folder)


def test_folders_whose_names_are_no_utf8(folder, monkeypatch):
    (folder.root.parent.parent / "caf\udce9").mkdir()
    monkeypatch.chdir(folder.root.parent.parent / "caf\udce9")
    write_command(folder, "hiertune search it.yaml --resume")
    assert b"caf\xe9' && hiertune search" in folder.resume.read_bytes()
    with pytest.raises(InputError, match=r"goes on with:\n  hiertune search it\.yaml --resume"):
        stop(folder)


def test_files_that_somebody_damaged_keep_no_search_from_being_stopped(folder, running):
    running(lambda: folder.trials.write_bytes(b"trial;x\n\xff;1\n"))
    assert "it has stopped; its trials: none was begun" in stop(folder)
