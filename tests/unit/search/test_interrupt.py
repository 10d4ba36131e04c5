"""Signals, in this very process; and a request file, which works as one."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from hiertune.search import interrupt
from hiertune.search.interrupt import NOW, STOP, Interruption, Skipped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Polls often, and does not end the tests' process."""
    monkeypatch.setattr(interrupt, "_POLL_S", 0.01)
    monkeypatch.setattr(interrupt, "leave", lambda words: None)
    monkeypatch.setattr(interrupt, "_forget_terminal", lambda: None)


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("number", SIGNALS)
def test_where_nothing_is_to_be_finished_the_first_signal_ends_at_once(number):
    with Interruption() as interruption:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        assert interruption.at_once
        signal.raise_signal(signal.SIGINT)  # what cleans up is not disturbed
        with pytest.raises(KeyboardInterrupt):
            interruption.check()


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_lets_epochs_finish_and_the_second_ends_at_once(number):
    with Interruption() as interruption:
        with interruption.finishing():
            signal.raise_signal(number)
            assert (interruption.asked, interruption.at_once) == (True, False)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert interruption.at_once


def test_once_asked_the_next_signal_ends_at_once_whatever_runs():
    with Interruption() as interruption:
        with interruption.finishing():
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), interruption.skippable():
            signal.raise_signal(signal.SIGINT)


def test_what_is_only_waited_for_can_be_skipped():
    with Interruption() as interruption:
        with pytest.raises(Skipped), interruption.skippable():
            signal.raise_signal(signal.SIGINT)
        assert not interruption.at_once


def test_a_closed_terminal_counts_once():
    with Interruption() as interruption, interruption.finishing():
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        assert (interruption.asked, interruption.at_once) == (True, False)


def test_signals_are_afterwards_what_they_were():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interruption():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_nohup_stays():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGHUP)
            assert not interruption.asked
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_are_taken_back_from_who_took_them():
    with Interruption() as interruption:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))  # as Ray does
        interruption.install()
        with interruption.finishing():
            signal.raise_signal(signal.SIGTERM)
        assert interruption.asked


def test_one_that_was_not_entered_takes_no_signal():
    before = [signal.getsignal(number) for number in SIGNALS]
    Interruption().install()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_request_file_is_a_signal_and_now_a_second_one(tmp_path):
    request = tmp_path / "stop"
    with Interruption() as interruption, interruption.watching(request), interruption.finishing():
        request.write_text(STOP)
        wait_until(lambda: interruption.asked)
        time.sleep(0.1)
        assert not interruption.at_once, "one request counts once"
        with pytest.raises(KeyboardInterrupt):
            wait_until(lambda: request.write_text(NOW) == 0)
        assert interruption.at_once
    assert not request.exists()


def test_now_needs_no_first_request(tmp_path):
    request = tmp_path / "stop"
    with (
        Interruption() as interruption,
        interruption.watching(request),
        interruption.finishing(),
        pytest.raises(KeyboardInterrupt),
    ):
        wait_until(lambda: request.write_text(NOW) == 0)


def test_a_request_is_heard_that_came_while_the_ledger_was_opened(tmp_path):
    request = tmp_path / "stop"
    request.write_text(STOP)
    with Interruption() as interruption, interruption.watching(request), interruption.finishing():
        wait_until(lambda: interruption.asked)
    assert not request.exists()


def test_a_request_wakes_what_waits(tmp_path):
    """As a signal it must reach the main thread, not only the interpreter."""
    request = tmp_path / "stop"
    threading.Timer(0.1, request.write_text, [NOW]).start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Interruption() as interruption, interruption.watching(request):
        time.sleep(30)
    assert time.monotonic() - begun < 20


def test_an_end_that_takes_too_long_is_cut_with_all_that_was_started():
    code = """
import signal, subprocess, sys, time
from hiertune.search import interrupt
sleep = "import time; time.sleep(60)"
start = f"import subprocess, sys; print(flush=True); subprocess.run([sys.executable, '-c', {sleep!r}])"
subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE).stdout.readline()
interrupt._LONGEST_END_S = 0.2
with interrupt.Interruption() as interruption:
    interruption.last_words = "go on with: this\\n"
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        time.sleep(60)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False
    )
    # Whoever lived on would hold the other end of its output, and `run` would wait for it.
    assert (done.returncode, done.stderr) == (130, "go on with: this\n")


def test_a_closed_terminal_is_no_error():
    """Writing to one would be; files and pipes stay what they were."""
    code = """
import os, sys
from hiertune.search.interrupt import _forget_terminal
os.read(0, 1)
_forget_terminal()
print("more")
sys.stdout.flush()
os.write(int(sys.argv[1]), b"fine")
"""
    leader, follower = os.openpty()
    told, tells = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tells)], stdin=subprocess.PIPE, stdout=follower, pass_fds=[tells]
    )
    os.close(follower)
    os.close(leader)
    process.communicate(b"x", timeout=50)
    assert process.returncode == 0
    assert os.read(told, 10) == b"fine"
    os.close(told)
    os.close(tells)
