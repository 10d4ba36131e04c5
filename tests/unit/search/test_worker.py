"""What a worker makes of an exception, and how it says that it gets on."""

import errno
import socket
import time

import pytest
import torch

from hiertune.search.messages import Cause
from hiertune.search.worker import _cause, _Link


def caught(error):
    try:
        raise error
    except Exception as again:  # noqa: BLE001 - whatever the test wants
        return again


NO_MEMORY = f"out of memory on {socket.gethostname()} (test_worker.py:"


@pytest.mark.parametrize(
    ("error", "fault", "begins"),
    [
        (MemoryError(), "out_of_memory", NO_MEMORY),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out_of_memory", NO_MEMORY),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried ..."
            ),
            "out_of_memory",
            NO_MEMORY,
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
            "out_of_memory",
            "out of memory on the GPU: CUDA out of memory",
        ),
        (KeyError("lr"), "error", "KeyError: 'lr' (test_worker.py:"),
        (
            ValueError("a\nstack:\n" + "x " * 1000),
            "error",
            "ValueError: a stack: " + "x " * 243 + "x ... (test_worker",
        ),
        (
            OSError(errno.EIO, "Input/output error"),
            "error",
            "OSError: [Errno 5] Input/output error (test_worker.py:",
        ),
    ],
)
def test_an_exception_has_its_fault_and_its_place(error, fault, begins):
    cause = _cause(caught(error))
    assert isinstance(cause, Cause)
    assert cause.fault == fault
    assert cause.reason.startswith(begins)


def test_the_allocator_really_says_so():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**55, dtype=torch.uint8)
    assert _cause(raised.value).fault == "out_of_memory"


class Beats:
    """A broker that notes what it hears."""

    def __init__(self):
        self.heard = []
        self.beat = self

    def remote(self, *told):
        self.heard.append(told)


def test_a_heart_beats_only_while_batches_are_done():
    broker = Beats()
    link = _Link(broker, "g", "token", 1, number=4)
    with link.heartbeat(0.1):
        link.beat()
        link.beat()
        _wait(lambda: broker.heard)
        assert broker.heard[-1] == ("g", "token", 1, (4, 0, 2))
        time.sleep(0.2)
        quiet = len(broker.heard)
        time.sleep(0.2)
        assert len(broker.heard) == quiet
        link.beat()
        _wait(lambda: len(broker.heard) > quiet)
        assert broker.heard[-1] == ("g", "token", 1, (4, 0, 3))
    before = len(broker.heard)
    link.beat()
    time.sleep(0.1)
    assert len(broker.heard) == before


def _wait(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
