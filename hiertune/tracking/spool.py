"""The files between a search and its delivery, all in the run folder.

`tracking.jsonl`: one JSON object per line, appended by the search, never rewritten. Every line has `op`
(open, start, log, end, artifact, close), `t` (milliseconds since 1970), `trial` (null is the search)
and, last, `n`: the number of values up to and including it. The newest `open` names the destination.
`tracking.offset`: how far delivery has got, written by the delivery process only.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SPOOL, STATE, LOCK, LOG = "tracking.jsonl", "tracking.offset", "tracking.lock", "tracking.log"
READ_BYTES = 1 << 18


@dataclass(frozen=True)
class Delivery:
    """How far delivery has got, in single values: a metric at a step, a parameter, a tag, a file."""

    delivered: int
    total: int
    error: str | None = None
    """Why it is late, or what MLflow refused for good."""

    @property
    def complete(self) -> bool:
        return self.delivered == self.total


@dataclass(frozen=True)
class State:
    """What survives a restart of the delivery process; `offset` bytes of the spool are dealt with."""

    destination: str = ""
    """Hash of the search and the place that `offset` and `runs` hold for."""
    offset: int = 0
    passed: int = 0
    """Values before `offset`."""
    refused: int = 0
    """Those among them that MLflow will never take."""
    error: str | None = None
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
        return Delivery(self.passed - self.refused, total, self.error)


@dataclass(frozen=True)
class Summary:
    """A whole spool at a glance."""

    header: dict[str, Any]
    """The newest `open` record; empty when there is none."""
    total: int
    closed: bool
    open_runs: tuple[int | None, ...]
    """Trials (None: the search) that were started and not ended."""


def delivery(run_dir: Path) -> Delivery:
    """How far the delivery of a run folder has got, from its files.

    Raises:
        FileNotFoundError: nothing was tracked there.
    """
    return State.load(run_dir).progress(summarise(run_dir).total)


def summarise(run_dir: Path) -> Summary:
    header: dict[str, Any] = {}
    total, last = 0, ""
    running: dict[int | None, None] = {}
    with (run_dir / SPOOL).open("rb") as file:
        for line in file:
            op = re.match(rb'{"op":"(\w+)"', line)
            if op is None or not line.endswith(b"}\n"):
                continue
            last = op[1].decode()
            total = int(line[line.rindex(b":") + 1 : -2])
            if last in ("open", "start", "end") and (record := parse(line)) is not None:
                if last == "open":
                    header = record
                elif last == "start":
                    running[record["trial"]] = None
                else:
                    running.pop(record["trial"], None)
    return Summary(header, total, last == "close", tuple(running))


def encode(record: Mapping[str, Any], total: int) -> bytes:
    """One line; values JSON doesn't know (paths, numpy scalars) as their text."""
    return json.dumps({**record, "n": total}, separators=(",", ":"), default=str).encode() + b"\n"


def parse(line: bytes) -> dict[str, Any] | None:
    """A record; None for a line that a full disk or a crash cut off."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def count(record: Mapping[str, Any]) -> int:
    """Values in a record; a run, its end and a file are one each."""
    named = sum(len(record.get(part, ())) for part in ("params", "tags", "metrics"))
    return named + (record["op"] in ("start", "end", "artifact"))


def read_lines(spool: Path, offset: int) -> bytes:
    """The next whole lines, about READ_BYTES of them."""
    with spool.open("rb") as file:
        file.seek(offset)
        data = file.read(READ_BYTES)
        if len(data) == READ_BYTES:
            data += file.readline()
    return data[: data.rfind(b"\n") + 1]


def cut_torn_line(spool: Path) -> None:
    """Drop what a crash left half written: no delivery reads past the last whole line."""
    with spool.open("r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)
