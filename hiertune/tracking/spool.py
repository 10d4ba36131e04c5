"""The files between a search and its delivery, all in the run folder.

`tracking.jsonl`: one JSON object per line, appended by the search, never rewritten. Every line has `op`
(open, start, log, end, artifact, close), `t` (milliseconds since 1970), `trial` (null is the search)
and, last, `n`: the number of values up to and including it. The newest `open` names the destination,
and who writes: its `session`, and the fields of its `Process`. A tag that is null is one to take away.
`tracking.offset`: how far delivery has got, written by the delivery process only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import filelock

SPOOL, STATE, LOG = "tracking.jsonl", "tracking.offset", "tracking.log"
LOCK = "tracking.lock"
"""Held by the delivery process at work."""
WRITER = "tracking.writer"
"""Held for a moment by whoever opens the spool, or ends it for a writer that died."""
READ_BYTES = 1 << 18

# A log line's ends, as `encode` makes them. Both must be whole: a crash may cut a line in two.
_LOG_HEAD = re.compile(rb'\{"op":"log","t":-?\d+,"trial":(\d+),"step":(-?\d+),"metrics":\{')
_LOG_TAIL = re.compile(rb'\},"n":(\d+)\}\n')


@dataclass(frozen=True)
class Delivery:
    """How far delivery has got, in single values: a metric at a step, a parameter, a tag, a file."""

    delivered: int
    total: int
    error: str | None = None
    """Why it is late, or what MLflow refused for good."""
    since: float | None = None
    """When MLflow last stopped taking anything, in seconds since 1970; None while it does."""

    @property
    def complete(self) -> bool:
        return self.delivered == self.total


@dataclass(frozen=True)
class State:
    """What survives a restart of the delivery process; `offset` bytes of the spool are dealt with."""

    destination: str = ""
    """Hash of the search and the place that `offset` and `runs` hold for."""
    uri: str = ""
    """That place, as it can be shown."""
    offset: int = 0
    passed: int = 0
    """Values before `offset`."""
    refused: int = 0
    """Those among them that MLflow will never take."""
    error: str | None = None
    since: float | None = None
    """When the outage began that is not over yet, in seconds since 1970."""
    runs: dict[str, str] = field(default_factory=dict)
    """MLflow's run id of each trial, and of the search under ''."""

    @classmethod
    def load(cls, run_dir: Path) -> State:
        try:
            return cls(**json.loads((run_dir / STATE).read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            return cls()  # a lost or torn record costs a second delivery, which changes nothing

    def save(self, run_dir: Path) -> None:
        fresh = run_dir / f"{STATE}.new"
        with fresh.open("w", encoding="utf-8") as file:
            json.dump(asdict(self), file)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(run_dir / STATE)

    def progress(self, total: int) -> Delivery:
        return Delivery(min(self.passed, total) - self.refused, total, self.error, self.since)


@dataclass
class Run:
    """What the spool holds of a trial, or of the search (then without `step`)."""

    step: int | None = None
    """The last one with metrics."""
    started: bool = False
    end: tuple[str, str | None] | None = None
    """State and reason of its last end; None while it is open."""
    told: bool = False
    """Whether MLflow shows a reason, which the next end may have to take back."""

    def apply(self, record: Mapping[str, Any]) -> None:
        """Take a `start` or an `end` into account."""
        reason = record["tags"].get(REASON)
        self.told = reason is not None
        if record["op"] == "start":
            self.started, self.end = True, None
        else:
            self.end = (record["state"], reason)


REASON = "hiertune.reason"


@dataclass(frozen=True)
class Summary:
    """A whole spool at a glance."""

    header: dict[str, Any]
    """The newest `open` record; empty when there is none."""
    total: int
    closed: bool
    runs: dict[int | None, Run]
    """By trial; the search under None."""
    points: dict[tuple[int, str], float]
    """The search's own metrics, by step and name."""

    @property
    def open_runs(self) -> tuple[int | None, ...]:
        """Trials (None: the search) that were started and not ended."""
        return tuple(trial for trial, run in self.runs.items() if run.started and run.end is None)


def destination(header: Mapping[str, Any]) -> str:
    """One place in one MLflow store, for one search."""
    place = " ".join(header[key] for key in ("uid", "uri", "experiment"))
    return hashlib.sha256(place.encode()).hexdigest()


def delivery(run_dir: Path) -> Delivery:
    """How far the delivery of a run folder has got, from its files.

    Raises:
        FileNotFoundError: nothing was tracked there.
    """
    return State.load(run_dir).progress(summarise(run_dir).total)


def is_tracked(run_dir: Path) -> bool:
    """Whether a folder is one of a search that tracks."""
    return os.path.isfile(run_dir / SPOOL)  # of any name; pathlib raises for one that is too long


def summarise(run_dir: Path) -> Summary:
    """Read a spool once; of a trial's metrics, which are nearly all of it, only the ends of the lines."""
    header: dict[str, Any] = {}
    total, closed = 0, False
    runs: dict[int | None, Run] = defaultdict(Run)
    points: dict[tuple[int, str], float] = {}
    with (run_dir / SPOOL).open("rb") as file:
        for line in file:
            log = _LOG_HEAD.match(line)
            if log is not None:
                tail = _LOG_TAIL.fullmatch(line, line.rfind(b"}", 0, -2))
                if tail is not None:
                    runs[int(log[1])].step = int(log[2])
                    total, closed = int(tail[1]), False
                continue
            record = parse(line) if line.endswith(b"\n") else None
            if record is None:
                continue
            op = record["op"]
            total, closed = record["n"], op == "close"
            if op == "open":
                header = record
            elif op in ("start", "end"):
                runs[record["trial"]].apply(record)
            elif op == "log":
                points |= {(record["step"], name): value for name, value in record["metrics"].items()}
    return Summary(header, total, closed, runs, points)


def encode(record: Mapping[str, Any], total: int) -> bytes:
    """One line; values JSON doesn't know (paths, numpy scalars) as their text."""
    return json.dumps({**record, "n": total}, separators=(",", ":"), default=str).encode() + b"\n"


def parse(line: bytes) -> dict[str, Any] | None:
    """A record; None for a line that a full disk or a crash cut off."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "n" in record else None


def count(record: Mapping[str, Any]) -> int:
    """Values in a record; a run, its end and a file are one each."""
    named = sum(len(record.get(part, ())) for part in ("params", "tags", "metrics"))
    return named + (record["op"] in ("start", "end", "artifact"))


def read_lines(spool: Path, offset: int, size: int = READ_BYTES) -> bytes:
    """The next whole lines, `size` bytes of them or a little more.

    They are on the disk when this returns: what MLflow has, the spool has after a power cut too.
    """
    with spool.open("r+b") as file:
        file.seek(offset)
        data = file.read(size)
        if len(data) == size:
            data += file.readline()
        if data:
            os.fsync(file.fileno())
    return data[: data.rfind(b"\n") + 1]


def cut_torn_line(spool: Path) -> None:
    """Drop what a crash left half written: no delivery reads past the last whole line."""
    with spool.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - READ_BYTES)
            file.seek(start)
            line_end = file.read(end - start).rfind(b"\n") + 1
            if line_end:
                end = start + line_end
                break
            end = start
        file.truncate(end)


def end_for_the_dead(run_dir: Path, session: str) -> None:
    """If the search that writes as `session` was killed before it closed the spool, end its open runs.

    Else they would look at work in MLflow for ever.
    """
    with filelock.FileLock(run_dir / WRITER):  # a search that goes on opens the spool under it
        spool = summarise(run_dir)
        if spool.closed or spool.header["session"] != session:
            return
        cut_torn_line(run_dir / SPOOL)
        now, total, lines = round(time.time() * 1000), spool.total, b""
        for trial in spool.open_runs:
            tags = {REASON: "the search was killed"}
            record = {"op": "end", "t": now, "trial": trial, "state": "interrupted", "tags": tags}
            total += count(record)
            lines += encode(record, total)
        lines += encode({"op": "close", "t": now, "trial": None}, total)
        with (run_dir / SPOOL).open("ab") as file:
            file.write(lines)
