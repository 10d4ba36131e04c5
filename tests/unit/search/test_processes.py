"""How the end of a process is understood, from what Ray says in words and from what it left."""

import os
import signal
import subprocess
import sys

import pytest
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayError

from hiertune.search.messages import Cause
from hiertune.search.processes import WorkerProcess, crash, judge, memory_kills

EXIT = """The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit \
detail: Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: \
(1) the process was killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or \
(3) the worker crashed unexpectedly due to SIGSEGV or another unexpected error."""
"""What Ray 2.60 says of a process that is gone, whatever it was."""


def process(rank=1, size=2, kills=4):
    return WorkerProcess(rank, size, actor=None, node="n", host="node7", log=None, memory_kills=kills)


@pytest.mark.parametrize(
    ("death", "crashed", "kills", "cause"),
    [
        (
            RayError(EXIT),
            None,
            4,
            Cause("crashed", "worker 2 of 2 was killed (SIGKILL, or an exit without a word)"),
        ),
        (
            RayError(EXIT),
            None,
            None,
            Cause("crashed", "worker 2 of 2 was killed (SIGKILL, or an exit without a word)"),
        ),
        (
            RayError(EXIT),
            "Segmentation fault in linear.py:7",
            5,
            Cause("crashed", "worker 2 of 2 crashed: Segmentation fault in linear.py:7"),
        ),
        (
            RayError(EXIT),
            None,
            5,
            Cause("out_of_memory", "worker 2 of 2 was killed by the kernel: node7 ran out of memory"),
        ),
        (
            RayError("1 worker(s) were killed due to the node running low on memory. ..."),
            None,
            4,
            Cause("out_of_memory", "worker 2 of 2 was ended by Ray: node7 ran low on memory"),
        ),
        (
            OutOfMemoryError("memory"),
            None,
            4,
            Cause("out_of_memory", "worker 2 of 2 was ended by Ray: node7 ran low on memory"),
        ),
        (
            RayError("The actor died because its node has died. Node Id: 00ff"),
            None,
            4,
            Cause("lost", "worker 2 of 2 is gone with its node node7"),
        ),
        (
            ActorUnavailableError("The actor can't be reached", None),
            None,
            4,
            Cause("lost", "worker 2 of 2 is gone with its node node7"),
        ),
        (RayError("The actor is dead because it was killed by `ray.kill`."), None, 4, None),
        (RayError("Worker exit type: INTENDED_USER_EXIT ..."), None, 4, None),
    ],
)
def test_the_cause_in_words(death, crashed, kills, cause):
    assert judge(process(), death, crashed, kills) == cause


def test_a_single_worker_has_no_number():
    cause = judge(process(0, 1), RayError(EXIT), None, 4)
    assert cause.reason == "the worker was killed (SIGKILL, or an exit without a word)"


@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGSEGV, "Segmentation fault"), (signal.SIGABRT, "Aborted"), (signal.SIGBUS, "Bus error")],
)
def test_where_a_real_process_crashed(tmp_path, number, words):
    script = tmp_path / "crashing.py"
    script.write_text(
        "import faulthandler, os\n"
        "faulthandler.enable(2)\n"
        "def train():\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "train()\n"
    )
    log = tmp_path / "log"
    with log.open("wb") as file:
        file.write(b"what went before\n" * 50_000)
        file.flush()
        done = subprocess.run([sys.executable, str(script)], stderr=file)
    assert done.returncode == -number
    assert crash(str(log)) == f"{words} in crashing.py:4"


def test_a_log_without_a_crash_tells_nothing(tmp_path):
    log = tmp_path / "log"
    log.write_text("Traceback (most recent call last)\n")
    assert crash(str(log)) is None
    assert crash(str(tmp_path / "none")) is None
    assert crash(None) is None
    log.write_text("Fatal Python error: Segmentation fault\n\n<no Python frame>\n")
    assert crash(str(log)) == "Segmentation fault"


def test_the_kernels_count_is_that_of_the_container_where_there_is_one(tmp_path):
    assert memory_kills(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "vmstat").write_text("nr_free_pages 1\noom_kill 3\n")
    assert memory_kills(tmp_path) == 3
    (tmp_path / "sys" / "fs" / "cgroup").mkdir(parents=True)
    (tmp_path / "sys" / "fs" / "cgroup" / "memory.events").write_text(
        "low 0\noom 2\noom_kill 1\noom_group_kill 0\n"
    )
    assert memory_kills(tmp_path) == 1


@pytest.mark.skipif(not os.path.exists("/proc/vmstat"), reason="Linux says it")
def test_this_machine_counts():
    assert memory_kills() >= 0
