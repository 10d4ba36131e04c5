"""The delivery process: carries a spool to MLflow, in order, for as long as somebody writes to it."""

from __future__ import annotations

import hashlib
import os
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock

from hiertune.tracking.spool import LOCK, SPOOL, State, count, encode, parse, read_lines, summarise
from hiertune.tracking.store import Emptied, Store, Unavailable, explain

POLL = 1.0  # seconds between looks at the spool
FIRST_DELAY, LONGEST_DELAY = 0.5, 10.0  # seconds between attempts while MLflow is unavailable


def deliver(run_dir: Path, parent: int, drain: bool, patience: float) -> None:
    """Deliver until the spool is closed, its writer `parent` is gone, or (`drain`) it is read to its end.

    A delivery that nobody waits for gives up after `patience` seconds without success. At most one
    process at a time works on a folder; a second one waits.
    """
    lock = filelock.FileLock(run_dir / LOCK)
    began = time.monotonic()
    while not lock.is_locked:
        try:
            lock.acquire(timeout=POLL)
        except filelock.Timeout:
            if os.getppid() != parent or (drain and time.monotonic() - began > patience):
                return  # whoever holds the lock is at work
    with lock:
        Courier(run_dir, parent, drain, patience).work()


class Courier:
    def __init__(self, run_dir: Path, parent: int, drain: bool, patience: float) -> None:
        self._run_dir = run_dir
        self._parent = parent
        self._drain = drain
        self._patience = patience
        self._store: Store | None = None
        self._closed = False
        self._header = summarise(run_dir).header
        place = " ".join(self._header[key] for key in ("uid", "uri", "experiment"))
        self._destination = hashlib.sha256(place.encode()).hexdigest()  # the address may hold a password
        self._state = State.load(run_dir)
        if self._state.destination != self._destination:
            self._state = State(self._destination)

    def work(self) -> None:
        delay, last_success = FIRST_DELAY, time.monotonic()
        while True:
            alone = self._orphaned()
            data = read_lines(self._run_dir / SPOOL, self._state.offset)
            if not data:
                if self._closed or alone or self._drain:
                    return
                last_success = time.monotonic()
                time.sleep(POLL)
            elif self._attempt(data):
                delay, last_success = FIRST_DELAY, time.monotonic()
            elif (alone or self._drain) and time.monotonic() - last_success > self._patience:
                return
            else:
                time.sleep(delay)
                delay = min(2 * delay, LONGEST_DELAY)

    def _orphaned(self) -> bool:
        """Whether the parent is gone. If it died in mid-search, the open runs are ended first, so that
        they don't look at work for ever."""
        if os.getppid() == self._parent:
            return False
        spool = summarise(self._run_dir)
        if spool.header["pid"] == self._parent and not spool.closed:
            now, total = round(time.time() * 1000), spool.total
            tags = {"hiertune.reason": "the search was killed"}
            lines = b"\n"  # its last line may be torn
            for trial in spool.open_runs:
                record = {"op": "end", "t": now, "trial": trial, "state": "interrupted", "tags": tags}
                total += count(record)
                lines += encode(record, total)
            lines += encode({"op": "close", "t": now, "trial": None}, total)
            with (self._run_dir / SPOOL).open("ab") as file:
                file.write(lines)
        return True

    def _attempt(self, data: bytes) -> bool:
        """Deliver `data` and note it; False, with the error noted, when it must be tried again."""
        records = [record for line in data.splitlines() if (record := parse(line)) is not None]
        try:
            if self._store is None:
                self._store = Store(self._run_dir, self._header, self._state.runs)
            self._store.refused = 0
            self._send(self._store, records)
        except Emptied:
            self._state = State(self._destination)  # the store was emptied: everything goes there again
            return True
        except Unavailable as error:
            runs = self._state.runs if self._store is None else dict(self._store.runs)
            self._state = replace(self._state, error=explain(error, self._header["uri"]), runs=runs)
            self._state.save(self._run_dir)
            self._store = None  # the connection may be what is broken
            return False
        self._state = replace(
            self._state,
            offset=self._state.offset + len(data),
            passed=records[-1]["n"] if records else self._state.passed,
            refused=self._state.refused + self._store.refused,
            error=self._store.refusal,
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
