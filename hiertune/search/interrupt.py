"""Ctrl-C and SIGTERM: once ends the search after the current epochs, twice ends it at once."""

from __future__ import annotations

import signal
from types import FrameType

from ray import tune

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption(tune.Stopper):
    """Says whether the user asked to stop. Tune polls it as a `Stopper`; use as a context manager.

    With `at_once` already the first signal raises KeyboardInterrupt, for work that nobody polls in.
    Needs the main thread, as signal handlers do.
    """

    def __init__(self, at_once: bool = False) -> None:
        self._at_once = at_once
        self.asked = False

    def __enter__(self) -> Interruption:
        self._before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(self, *exc_info) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def ask(self) -> None:
        """Stop as after one Ctrl-C."""
        self.asked = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked or self._at_once:
            raise KeyboardInterrupt
        self.asked = True

    def __call__(self, trial_id: str, result: dict) -> bool:
        return self.asked

    def stop_all(self) -> bool:
        """Never: each trial stops with the result of its current epoch, which Tune would else throw away."""
        return False

    def __getstate__(self) -> dict:
        """For Tune's snapshot, which is never restored."""
        return {"_at_once": False, "asked": False}
