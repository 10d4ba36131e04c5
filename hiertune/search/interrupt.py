"""How a user stops a search: Ctrl-C, SIGTERM, a closed terminal, or `hiertune stop`. Imports no Ray.

What is running when the first of them comes decides what it does: training ends its epochs, waiting for
tracking is given up, anything else ends at once, since nothing of it would be lost. A second one always
ends the search at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

import psutil

from hiertune._process import end_families

INTERRUPTED = 130
"""Exit code of a search that was stopped."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_POLL_S = 1.0
_LONGEST_END_S = 10.0
"""How long ending at once may take; then the process is dropped."""


class SearchInterrupted(Exception):
    """The user stopped the search, and it has saved its state; the text says how far it got."""


class Skipped(Exception):
    """The user does not want to wait for what is going on."""


class Interruption:
    """Whether and how the user wants the search to stop. A context manager, for the main thread;
    nothing is taken from the user before it is entered."""

    def __init__(self) -> None:
        self.asked = False
        """To stop after the current epochs, or to wait no longer."""
        self.at_once = False
        """KeyboardInterrupt was raised: whatever cleans up must not wait. Further signals do nothing."""
        self.last_words = "stopped before the search began; the same command starts it\n"
        """Printed by `leave`, after ending at once, or when that takes too long."""
        self._first: Literal["end", "finish", "skip"] = "end"
        self._now = False
        self._left = threading.Event()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        self.install()
        return self

    def __exit__(self, *exc_info) -> None:
        self._left.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Take the signals; again after Ray has started, which takes SIGTERM for itself."""
        for number, before in self._before.items():
            if before is not signal.SIG_IGN:  # nohup
                signal.signal(number, self._on_signal)

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Within, the first signal only sets `asked`."""
        with self._when_first("finish"):
            yield

    @contextlib.contextmanager
    def skippable(self) -> Iterator[None]:
        """Within, the first signal raises Skipped."""
        with self._when_first("skip"):
            yield

    @contextlib.contextmanager
    def watching(self, request: Path) -> Iterator[None]:
        """Within, the file `request` works as a signal; with the text `now` in it as a second one.

        An answered request is removed; one from before the search had its folder `FolderLock` removes.
        """
        left = threading.Event()
        threading.Thread(target=self._watch, args=(request, left), daemon=True).start()
        try:
            yield
        finally:
            left.set()
            request.unlink(missing_ok=True)

    def ask(self) -> None:
        """Work as a signal does; from any thread."""
        # To the main thread, so that whatever it waits for is woken.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def stopped(self, how_far: str) -> NoReturn:
        """Raise SearchInterrupted; who does not wait for what follows is told `how_far` all the same."""
        self.last_words = f"stopped: {how_far}\n"
        raise SearchInterrupted(how_far)

    def check(self) -> None:
        """Raise the KeyboardInterrupt that some library has swallowed."""
        if self.at_once:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def _when_first(self, action: Literal["finish", "skip"]) -> Iterator[None]:
        self._first = action
        try:
            yield
        finally:
            self._first = "end"

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _forget_terminal()
            # The shell sends it, and then the kernel: that is one terminal, closed once.
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if self.at_once:
            return
        if self._first != "end" and not self.asked and not self._now:
            self.asked = True
            if self._first == "skip":
                raise Skipped
            return
        self.at_once = True
        threading.Thread(target=self._end_in_time, daemon=True).start()
        raise KeyboardInterrupt

    def _watch(self, request: Path, left: threading.Event) -> None:
        seen = None
        while not left.wait(_POLL_S):
            try:
                text = request.read_text(encoding="utf-8").strip()
            except OSError:  # there is none, or the shared folder is away for a moment
                continue
            if text != seen:
                seen = text
                self._now = text == NOW
                self.ask()

    def _end_in_time(self) -> None:
        if not self._left.wait(_LONGEST_END_S):
            leave(self.last_words)


STOP, NOW = "stop", "now"
"""What a request file holds."""


def leave(words: str = "", code: int = INTERRUPTED) -> NoReturn:
    """End this process here, and what it has started: no thread is joined, nothing is cleaned up."""
    with contextlib.suppress(OSError):
        os.write(2, words.encode())  # first: a pipe that nobody reads from lets nothing else through
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    # Two of Ray's would take 60 to 90 s to notice that it is gone.
    end_families(psutil.Process().children())
    os._exit(code)


def _forget_terminal() -> None:
    """Every further write to a closed terminal would be an error."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        with contextlib.suppress(OSError):
            os.fstat(number)
            if _is_terminal(number):
                os.dup2(nowhere, number)
    os.close(nowhere)


def _is_terminal(number: int) -> bool:
    """Also of one that has hung up, which `isatty` denies."""
    status = os.fstat(number)
    return stat.S_ISCHR(status.st_mode) and status.st_rdev != os.stat(os.devnull).st_rdev
