"""A process that loses Ray begins anew as itself, and gives up in the end. Its ports are made here."""

import os
import shutil
import socket
import subprocess
import sys

import pytest

LOSES_RAY = """
import os, subprocess, sys
from hiertune.search.lifeline import Lifeline, attempt

child = subprocess.Popen(["sleep", "100"])
print("attempt", attempt(), "process", os.getpid(), "child", child.pid, flush=True)
alive, dead, action = sys.argv[1:]
command = [sys.executable, *sys.orig_argv[1:]]
stopping = action == "progresses" and attempt() == 1
lifeline = Lifeline(command, "type this", own_ray=True, stopping=lambda: stopping)
if action == "progresses":
    lifeline.progressed()
lifeline._places = {"raylet": ("127.0.0.1", int(alive)), "gcs": ("127.0.0.1", int(alive))}
lifeline.check()
print("well", flush=True)
lifeline._places["gcs"] = ("127.0.0.1", int(dead))
if action == "closed":
    lifeline.close()
lifeline.check()
print("meant", flush=True)
child.kill()
"""


@pytest.fixture
def ports():
    """A port that is listened to, and one that is not."""
    with socket.create_server(("127.0.0.1", 0)) as alive, socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))
        yield str(alive.getsockname()[1]), str(dead.getsockname()[1])


def lose(ports, action, attempt=0):
    return subprocess.run(
        [sys.executable, "-c", LOSES_RAY, *ports, action],
        env=os.environ | {"HIERTUNE_ATTEMPT": str(attempt)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def begun(done):
    return [line.split() for line in done.stdout.splitlines() if line.startswith("attempt")]


def test_it_begins_anew_as_the_same_process_and_gives_up_after_three_times_in_vain(ports):
    done = lose(ports, "again", attempt=2)
    assert [words[1] for words in begun(done)] == ["2", "3"]
    assert len({words[3] for words in begun(done)}) == 1, "its process id stays"
    for words in begun(done):
        assert not _runs(words[5]), "what it started is ended"
    assert done.stdout.count("well") == 2
    assert "meant" not in done.stdout
    assert done.returncode == 1
    assert done.stderr.count("Ray's head (its GCS) is gone; the search begins anew from its ledger") == 1
    assert done.stderr.endswith("Ray's head (its GCS) is gone; go on with:\n  type this\n")


def test_a_trained_epoch_makes_the_next_attempt_the_first_unless_the_search_is_to_stop(ports):
    done = lose(ports, "progresses", attempt=3)
    assert [words[1] for words in begun(done)] == ["3", "1"]
    assert done.stderr.endswith("go on with:\n  type this\n")


def test_what_happens_after_the_end_is_meant(ports):
    done = lose(ports, "closed")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("meant\n")


STARTS_RAY = """
import os, subprocess, sys, time
from hiertune.search.lifeline import Lifeline, attempt

print("attempt", attempt(), "process", os.getpid(), flush=True)
lifeline = Lifeline([sys.executable, *sys.orig_argv[1:]], "type this", own_ray=True)
lifeline.watch_start()
head = subprocess.Popen([sys.argv[1], "100"])
time.sleep(2.5)
head.kill()
time.sleep(60)  # as Ray does
"""


def test_a_head_that_dies_while_ray_starts_is_not_waited_for(tmp_path):
    head = tmp_path / "gcs_server"
    shutil.copy(shutil.which("sleep"), head)
    done = subprocess.run(
        [sys.executable, "-c", STARTS_RAY, str(head)],
        env=os.environ | {"HIERTUNE_ATTEMPT": "2"},
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert [words[1] for words in begun(done)] == ["2", "3"]
    assert len({words[3] for words in begun(done)}) == 1
    assert done.returncode == 1
    assert done.stderr.count("Ray died while it started; the search begins anew from its ledger") == 1
    assert done.stderr.endswith("Ray died while it started; go on with:\n  type this\n")


def _runs(process):
    return (
        subprocess.run(["ps", "-p", process, "-o", "pid="], capture_output=True, check=False).returncode == 0
    )
