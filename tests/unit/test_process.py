"""Whether a process that was written down still runs."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from hiertune._process import Process
from hiertune.search.mirror import Session
from hiertune.tracking.courier import is_dead

SAY_WHO = (
    "import json, time; from dataclasses import asdict; from hiertune._process import Process\n"
    "print(json.dumps(asdict(Process.this())), flush=True); time.sleep(600)\n"
)


@pytest.fixture
def other():
    """Another process, and what it wrote down of itself."""
    process = subprocess.Popen([sys.executable, "-c", SAY_WHO], stdout=subprocess.PIPE, text=True)
    yield process, Process(**json.loads(process.stdout.readline()))
    process.kill()
    process.wait()


def elsewhere(process):
    """Under the same host name: after a reboot, and in another container."""
    boot, namespace = process.machine.split(" ", 1)
    return [
        replace(process, machine=f"{boot[::-1]} {namespace}"),
        replace(process, machine=f"{boot} pid:[7]"),
    ]


def test_a_process_lives_until_it_has_ended(other):
    process, noted = other
    assert noted.lives is True
    process.kill()
    process.wait()
    assert noted.lives is False


def test_its_number_alone_tells_nothing(other):
    _, noted = other
    assert replace(noted, born="1").lives is False, "the number was given to another process"
    assert [each.lives for each in elsewhere(noted)] == [None, None]
    assert replace(noted, machine="", born="").lives is None, "a version that did not note them"
    assert replace(noted, born="").lives is None
    assert replace(noted, born="", pid=2**22 + 1).lives is False  # no such process


def test_what_a_process_ran_before_exec_has_ended():
    code = (
        "import json, os, sys; from dataclasses import asdict; from hiertune._process import Process\n"
        "if len(sys.argv) > 1:\n"
        "    before = Process(**json.loads(sys.argv[1]))\n"
        "    print(before.lives, before.pid == os.getpid(), Process.this().born == before.born)\n"
        "else:\n"
        "    assert Process.this().lives\n"
        "    os.execv(sys.executable, [sys.executable, '-c', CODE, json.dumps(asdict(Process.this()))])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"CODE = {code!r}\n{code}"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False True True\n"


def test_delivery_and_storage_ask_the_same(other):
    process, noted = other
    sessions = [Session(**asdict(each), id="x", user="eve", begun="") for each in (noted, *elsewhere(noted))]
    headers = [{"op": "open", "session": "s"} | asdict(each) for each in (noted, *elsewhere(noted))]
    assert [session.died for session in sessions] == [is_dead(header) for header in headers] == [False] * 3
    assert is_dead(headers[0] | {"born": "1"})
    assert replace(sessions[0], born="1").died
    process.kill()
    process.wait()
    # Of what another machine of this name does nothing is known, though the number is free here.
    assert [session.died for session in sessions] == [is_dead(header) for header in headers]
    assert [session.died for session in sessions] == [True, False, False]
    assert not is_dead({"host": noted.host, "pid": noted.pid}), "an earlier version's"
    assert Session.new().died, "an earlier one of this very process"
