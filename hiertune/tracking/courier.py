"""The delivery process: carries a spool to MLflow, in order, for as long as somebody writes to it."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import filelock

from hiertune._process import Process
from hiertune.tracking.spool import (
    LOCK,
    READ_BYTES,
    SPOOL,
    State,
    destination,
    end_for_the_dead,
    parse,
    read_lines,
    summarise,
)
from hiertune.tracking.store import Emptied, Store, Unavailable, explain
from hiertune.tracking.uri import display_uri

POLL = 1.0  # seconds between looks at the spool
FIRST_DELAY, LONGEST_DELAY = 0.5, 10.0  # seconds between attempts while MLflow is unavailable


def deliver(run_dir: Path, parent: int, drain: bool, patience: float) -> None:
    """Deliver until the spool is closed, its writer `parent` is gone, or (`drain`) it is read to its end.

    The address is that of MLFLOW_TRACKING_URI. A delivery that nobody waits for gives up after
    `patience` seconds without success. At most one process at a time works on a folder; a second one
    waits, and if it came to drain, for what the first one delivers.
    """
    starter = Starter(parent)
    lock = filelock.FileLock(run_dir / LOCK)
    wanted = summarise(run_dir).total
    passed, last_success = -1, time.monotonic()
    while not lock.is_locked:
        with contextlib.suppress(filelock.Timeout):
            lock.acquire(timeout=POLL)
            break
        state = State.load(run_dir)  # of whoever holds the lock and is at work
        if state.passed != passed:
            passed, last_success = state.passed, time.monotonic()
        if starter.gone or (drain and (passed >= wanted or time.monotonic() - last_success > patience)):
            return
    with lock:
        Courier(run_dir, starter, drain, patience).work()


class Starter:
    """The process that started this one. Its end of our standard input closes when it says so or dies."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._left = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while os.read(0, 1):
            pass
        self._left.set()

    @property
    def gone(self) -> bool:
        return self._left.is_set() or os.getppid() != self._pid

    def wait(self, seconds: float) -> None:
        """Sleep; until the starter leaves, if it does so meanwhile."""
        if self._left.is_set():
            time.sleep(seconds)
        else:
            self._left.wait(seconds)


class Courier:
    def __init__(self, run_dir: Path, starter: Starter, drain: bool, patience: float) -> None:
        self._run_dir = run_dir
        self._starter = starter
        self._drain = drain
        self._patience = patience
        self._store: Store | None = None
        self._closed = False
        self._disturbed = False
        self._uri = os.environ["MLFLOW_TRACKING_URI"]
        self._header = {**summarise(run_dir).header, "uri": display_uri(self._uri)}
        self._state = State.load(run_dir)
        spooled = (run_dir / SPOOL).stat().st_size
        if self._state.destination != destination(self._header) or self._state.offset > spooled:
            self._state = self._nothing_sent()

    def _nothing_sent(self) -> State:
        return State(destination(self._header), self._header["uri"])

    def work(self) -> None:
        delay, size, last_success, left = FIRST_DELAY, READ_BYTES, time.monotonic(), False
        session = self._header["session"]
        if self._drain and is_dead(self._header):
            end_for_the_dead(self._run_dir, session)
        while True:
            if self._starter.gone and not left:
                left = True
                last_success = time.monotonic()
                if not self._drain:
                    end_for_the_dead(self._run_dir, session)
            data = read_lines(self._run_dir / SPOOL, self._state.offset, size)
            if not data:
                if self._closed or left or self._drain:
                    break
                self._starter.wait(POLL)
            elif self._attempt(data):
                delay, last_success, size = FIRST_DELAY, time.monotonic(), min(8 * size, READ_BYTES)
            elif (left or self._drain) and self._is_over(last_success):
                break
            else:
                self._starter.wait(delay)
                delay = min(2 * delay, LONGEST_DELAY)
                size = max(size // 8, 1)  # where many a request fails, only small steps get through

    def _is_over(self, last_success: float) -> bool:
        """Whether to give up: in time, or at once for a search that went on and has its own delivery."""
        late = time.monotonic() - last_success > self._patience
        return late or summarise(self._run_dir).header["session"] != self._header["session"]

    def _attempt(self, data: bytes) -> bool:
        """Deliver `data` and note it; False, with the error noted, when it must be tried again."""
        records = [record for line in data.splitlines() if (record := parse(line)) is not None]
        try:
            if self._store is None:
                self._store = Store(self._run_dir, {**self._header, "uri": self._uri}, self._state.runs)
            self._store.refused = 0
            self._send(self._store, records)
        except Emptied:
            self._state, self._store = self._nothing_sent(), None  # everything goes there again
            return True
        except Unavailable as error:
            self._state = replace(
                self._state,
                error=explain(error, self._uri),
                since=self._state.since or time.time(),
                runs=self._state.runs if self._store is None else dict(self._store.runs),
            )
            self._state.save(self._run_dir)
            self._store = None  # the connection may be what is broken
            self._disturbed = True
            return False
        self._state = replace(
            self._state,
            offset=self._state.offset + len(data),
            passed=records[-1]["n"] if records else self._state.passed,
            refused=self._state.refused + self._store.refused,
            error=self._store.refusal,
            since=None,
            runs=dict(self._store.runs),
        )
        self._state.save(self._run_dir)
        return True

    def _send(self, store: Store, records: Iterable[dict[str, Any]]) -> None:
        """Send records in order per run, its metrics gathered into large requests."""
        waiting: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for record in records:
            op = record["op"]
            trial = "" if record["trial"] is None else str(record["trial"])
            self._closed = op == "close"
            if op == "log":
                waiting[trial].append(record)
                continue
            store.log(trial, waiting.pop(trial, ()))
            if op == "start":
                store.start(trial, record)
            elif op == "end":
                store.end(trial, record)
            elif op == "artifact":
                store.artifact(trial, record)
        for trial, logs in waiting.items():
            store.log(trial, logs)
        if self._closed and self._disturbed:
            store.remove_doubles()


def is_dead(writer: Mapping[str, Any]) -> bool:
    """Whether the process that wrote an `open` record is known to be gone."""
    known = {field.name: writer[field.name] for field in fields(Process) if field.name in writer}
    return Process(**known).lives is False
