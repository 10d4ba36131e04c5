"""What a user does not wait for: MLflow that is not there."""

import contextlib
import io
import os
import signal
import socket
import threading
import time

import pytest
from rich.console import Console

from hiertune.search.driver import _deliver
from hiertune.search.interrupt import Interruption
from hiertune.tracking import Tracker

CONSOLE = Console(file=io.StringIO())


@pytest.fixture
def tracker(tmp_path):
    """One that delivers to a server which takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        tracker = Tracker.start(tmp_path, f"http://127.0.0.1:{server.getsockname()[1]}", "x", "search")
        tracker.search_started({})
        tracker.log(None, 0, {"a": 1.0, "b": 2.0})
        yield tracker
        with contextlib.suppress(ProcessLookupError):
            tracker._process.kill()


def press_ctrl_c_after(seconds):
    threading.Timer(seconds, os.kill, [os.getpid(), signal.SIGINT]).start()


def test_ctrl_c_ends_the_waiting_and_what_is_left_stays_in_the_spool(tracker):
    begun = time.monotonic()
    with Interruption() as interruption:
        press_ctrl_c_after(0.5)
        delivery = _deliver(tracker, interruption, CONSOLE)
    assert time.monotonic() - begun < 30
    assert (delivery.delivered, delivery.total) == (0, 3)  # two metrics and the start
    assert tracker._process.poll() is not None, "nothing is left running"
    assert not interruption.at_once, "the search itself goes on to its end"


def test_once_the_search_was_stopped_ctrl_c_ends_it_at_once(tracker):
    with Interruption() as interruption:
        with interruption.finishing():
            signal.raise_signal(signal.SIGINT)
        press_ctrl_c_after(0.5)
        with pytest.raises(KeyboardInterrupt):
            _deliver(tracker, interruption, CONSOLE)
    assert tracker._process.poll() is not None


def test_a_search_that_ends_at_once_waits_two_seconds(tracker):
    interruption = Interruption()
    interruption.at_once = True
    begun = time.monotonic()
    _deliver(tracker, interruption, CONSOLE)
    assert time.monotonic() - begun < 30
    assert tracker._process.poll() is not None
