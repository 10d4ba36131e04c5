"""The search's side of tracking."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import filelock

from hiertune._process import Process
from hiertune.errors import InputError
from hiertune.tracking.spool import (
    LOCK,
    LOG,
    REASON,
    SPOOL,
    WRITER,
    Delivery,
    Run,
    State,
    Summary,
    count,
    cut_torn_line,
    delivery,
    destination,
    encode,
    is_tracked,
    summarise,
)
from hiertune.tracking.uri import check_uri, display_uri, resolve_uri

SYNC_PATIENCE = 60.0
RESTART_AFTER = 30.0  # seconds between restarts of a delivery process that died
REQUEST_TIMEOUT = 30  # seconds; MLflow's own 120 is long for a terminal that says nothing meanwhile
STARTUP = 30.0  # seconds that a delivery process may take to import mlflow on a busy machine
TAKEN_OVER = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_ACTIVE_MODEL_ID")


class Ended(Protocol):
    """A trial that came to its end, as the ledger has it."""

    @property
    def number(self) -> int: ...
    @property
    def state(self) -> str: ...
    @property
    def reason(self) -> str | None: ...
    @property
    def params(self) -> Mapping[str, Any]: ...
    @property
    def attempts(self) -> int: ...
    @property
    def fault(self) -> str | None: ...
    @property
    def epochs(self) -> int: ...
    @property
    def metrics(self) -> Mapping[str, float]:
        """Of its last epoch."""


class Tracker:
    """The search's end of tracking. Its methods take microseconds, raise nothing of MLflow's or the
    disk's, and may be called from any thread. `trial=None` is the search itself (the parent run).

    What the spool has already is not written again: an epoch that a resumed trial reports once more,
    an end that is known.
    """

    def __init__(self, run_dir: Path, uri: str, header: Mapping[str, Any], before: Summary) -> None:
        self._run_dir = run_dir
        self._uri = uri
        self._lock = threading.Lock()
        self._total = before.total
        self._runs = before.runs
        self._points = before.points
        self._closed = False
        self._lost = 0
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        self._spool = os.open(run_dir / SPOOL, flags, 0o600)
        self._destination = destination(header)
        self._write("open", **header, session=uuid.uuid4().hex, **asdict(Process.this()))
        self._launch()

    @classmethod
    def start(
        cls, run_dir: Path, uri: str, experiment: str, search_name: str, resume: bool = False
    ) -> Tracker:
        """Open the spool of `run_dir` and start its delivery to `uri` (from `resolve_uri`).

        With `resume` an existing spool is continued. What was delivered isn't sent again, unless `uri`
        or `experiment` is another one: then everything is, so that the new place is complete too.

        Raises:
            FileExistsError: there is a spool, and `resume` is off.
        """
        run_dir = Path(run_dir).resolve()
        before = Summary({}, 0, True, defaultdict(Run), {})
        with filelock.FileLock(run_dir / WRITER):  # the delivery of a writer that died may be ending its runs
            if (run_dir / SPOOL).exists():
                if not resume:
                    raise FileExistsError(run_dir / SPOOL)
                cut_torn_line(run_dir / SPOOL)
                before = summarise(run_dir)
            uid = before.header.get("uid", uuid.uuid4().hex)
            header = {"uri": display_uri(uri), "experiment": experiment, "search": search_name, "uid": uid}
            return cls(run_dir, uri, header, before)

    def search_started(self, params: Mapping[str, Any], tags: Mapping[str, Any] | None = None) -> None:
        """Parameters by key path, in MLflow as written in YAML."""
        self._change("start", None, None, params=params, tags=tags or {})

    def trial_started(
        self, trial: int, params: Mapping[str, Any], tags: Mapping[str, Any] | None = None
    ) -> None:
        """A trial that was interrupted may be started again: its run goes on."""
        self._change("start", trial, None, params=params, tags=tags or {})

    def log(
        self, trial: int | None, step: int, metrics: Mapping[str, float], timestamp: float | None = None
    ) -> None:
        """All metrics of one step; `timestamp` in seconds since 1970, by default now.

        A trial's steps only grow: one that is not above its last is known already. Of the search's own
        metrics those are known that have the same value at the same step.
        """
        numbers = {name: float(value) for name, value in metrics.items()}
        with self._lock:
            if trial is None:
                numbers = {name: value for name, value in numbers.items() if self._is_new(step, name, value)}
                if not numbers:
                    return
            elif (last := self._runs[trial].step) is not None and step <= last:
                return
            if not self._append("log", trial, timestamp, step=int(step), metrics=numbers):
                return
            if trial is None:
                self._points |= {(step, name): value for name, value in numbers.items()}
            else:
                self._runs[trial].step = step

    def _is_new(self, step: int, name: str, value: float) -> bool:
        return repr(self._points.get((step, name))) != repr(value)  # NaN is NaN

    def trial_ended(
        self, trial: int, state: str, reason: str | None = None, tags: Mapping[str, str] | None = None
    ) -> None:
        """`state`: completed, pruned, failed or interrupted."""
        if self._runs[trial].end != (state, reason):
            self._change("end", trial, reason, state=state, tags=tags or {})

    def reconcile(self, ended: Iterable[Ended]) -> None:
        """Make the spool agree with the ledger about the trials that have ended.

        After a crash a trial may be open here, or called interrupted, that the ledger knows as
        completed. One that was never started here (its lines were lost) gets a run with its parameters;
        one whose last epoch is missing gets that.
        """
        for record in ended:
            run = self._runs[record.number]
            if not run.started:
                self.trial_started(record.number, record.params)
            if record.metrics and (run.step is None or run.step < record.epochs):
                self.log(record.number, record.epochs, record.metrics)
            self.end(record)

    def end(self, record: Ended) -> None:
        """How a trial ended, by the ledger."""
        tags = {"hiertune.attempts": str(record.attempts)}
        if record.fault is not None:
            tags["hiertune.fault"] = record.fault
        self.trial_ended(record.number, record.state, record.reason, tags)

    def artifact(self, trial: int | None, path: str | Path, artifact_path: str | None = None) -> None:
        """A file of the run folder, or a folder in it with all that is in it. It is read at delivery: leave
        it where it is. What lies elsewhere is refused there."""
        path = Path(path).resolve()
        if path.is_relative_to(self._run_dir):  # so that the folder may be moved before `sync`
            path = path.relative_to(self._run_dir)
        self._write("artifact", trial, path=str(path), artifact_path=artifact_path)

    def search_ended(
        self, state: str, metrics: Mapping[str, float] | None = None, tags: Mapping[str, Any] | None = None
    ) -> None:
        """`state`: completed, failed or interrupted."""
        self.log(None, 0, metrics or {})
        self._change("end", None, None, state=state, tags=tags or {})

    def status(self) -> Delivery:
        """How far delivery has got; restarts a delivery process that died. Cheap enough to poll."""
        code = self._process.poll()
        if code is not None and not self._closed and time.monotonic() - self._launched > RESTART_AFTER:
            self._release()
            self._launch()
        state = State.load(self._run_dir)
        if state.destination != self._destination:
            state = State()  # of an earlier session, elsewhere
        progress = state.progress(self._total + self._lost)
        if self._lost:
            return replace(progress, error=f"{self._run_dir / SPOOL} could not be written: is the disk full?")
        if code and not self._closed:
            return replace(progress, error=f"delivery ended with code {code}; see {self._run_dir / LOG}")
        return progress

    def close(self, patience: float, *, hurry: bool = False) -> Delivery:
        """End the spool and wait for its delivery; `sync` delivers what is left.

        It is waited for as long as points arrive, and given up `patience` seconds after the last did;
        at once, if that is 0. A delivery that has just been launched has longer for its start, unless it is
        to `hurry`. May be called again after an exception that broke off the waiting.
        """
        if not self._closed:
            self._write("close")
            self._closed = True
            os.close(self._spool)
        if self._process.poll():
            self._release()
            self._launch()
        self._release()
        if patience > 0:
            self._wait(patience, 0.0 if hurry else STARTUP)
        if self._process.poll() is None:
            self._process.kill()  # delivery is made to be cut off anywhere
            self._process.wait()
        status = self.status()
        if status.error is None and not status.complete:
            return replace(status, error=f"no answer from {display_uri(self._uri)} in time")
        return status

    def _wait(self, patience: float, startup: float) -> None:
        ready = self._launched + startup
        passed, deadline = self.status().delivered, time.monotonic() + patience
        while self._process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.1)
            now = time.monotonic()
            state = self.status()
            if state.delivered > passed:
                passed, deadline, ready = state.delivered, now + patience, now
            elif now > deadline and (now > ready or state.error is not None):
                return

    def _launch(self) -> None:
        self._process = launch_delivery(self._run_dir, self._uri)
        self._launched = time.monotonic()

    def _release(self) -> None:
        """Tell delivery that no more will come; it hears the same when this process dies."""
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _write(
        self, op: str, trial: int | None = None, timestamp: float | None = None, **content: Any
    ) -> None:
        with self._lock:
            self._append(op, trial, timestamp, **content)

    def _change(self, op: str, trial: int | None, reason: str | None, **content: Any) -> None:
        """A start or an end; what MLflow shows as the reason of an earlier end is taken back."""
        with self._lock:
            run = self._runs[trial]
            if reason is not None or run.told:
                content["tags"] = {**content["tags"], REASON: reason}
            if self._append(op, trial, None, **content):
                run.apply({"op": op, **content})

    def _append(self, op: str, trial: int | None, timestamp: float | None, **content: Any) -> bool:
        """One line; False if the disk didn't take it. The lock is held."""
        now = time.time() if timestamp is None else timestamp
        record = {"op": op, "t": round(now * 1000), "trial": trial, **content}
        size = count(record)
        data = encode(record, self._total + size)
        if self._lost:
            data = b"\n" + data  # a line that a full disk cut off must not swallow this one
        try:
            complete = os.write(self._spool, data) == len(data)
        except OSError:
            complete = False
        if complete:
            self._total += size
        else:
            self._lost += size
        return complete


def launch_delivery(run_dir: Path, uri: str, *options: str) -> subprocess.Popen[bytes]:
    """A delivery process in a session of its own, so that Ctrl-C in the terminal leaves it at work.

    Its standard input ends when this process closes it, or dies.
    """
    env = {key: value for key, value in os.environ.items() if key not in TAKEN_OVER}
    env["MLFLOW_TRACKING_URI"] = uri  # not on its command line: it may hold a password
    env["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"  # retries are ours: MLflow's take minutes per call
    env["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(REQUEST_TIMEOUT)
    env.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    package_root = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, env.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "hiertune.tracking", "deliver", str(run_dir / SPOOL)]
    with (run_dir / LOG).open("ab") as log:
        return subprocess.Popen(
            [*command, "--parent", str(os.getpid()), *options],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=env,
            start_new_session=True,
        )


def sync(run_dir: Path, uri: str | None = None, patience: float = SYNC_PATIENCE) -> Delivery:
    """Deliver what a search left in its spool; gives up after `patience` seconds without success.

    While the search still runs, its own delivery is waited for, up to what is in the spool now.

    Args:
        uri: where to, instead of where the search did. Everything is delivered there.

    Raises:
        InputError: nothing was tracked in this folder, its address can't be used, or another one was
            given while the search still runs.
    """
    run_dir = Path(run_dir).resolve()
    header = _header(run_dir)
    if not os.access(run_dir, os.W_OK):
        allowed = "a folder that this user may write to: how far delivery has got is noted there"
        raise InputError("can't be written", file=run_dir, allowed=allowed)
    address = _address(run_dir, header, uri)
    if display_uri(address) != header["uri"] and at_work(run_dir):
        raise InputError(
            "the search still runs, and delivers elsewhere",
            file=run_dir,
            key="--uri",
            allowed=f"{header['uri']} while it runs, any other address after it",
        )
    options = ("--drain", "--patience", str(patience))
    with launch_delivery(run_dir, address, *options) as process:
        code = process.wait()
    progress = delivery(run_dir)
    if code:
        return replace(progress, error=f"delivery ended with code {code}; see {run_dir / LOG}")
    return progress


def at_work(run_dir: Path) -> bool:
    """Whether a delivery is at work there on this machine: the search still runs, or a `sync` does."""
    lock = filelock.FileLock(run_dir / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return True
    except OSError:  # another user's folder, which can be looked at
        return False
    lock.release()
    return False


def destination_of(run_dir: Path) -> str:
    """Where a search's values went last, as it can be shown.

    Raises:
        InputError: nothing was tracked in this folder.
    """
    return State.load(run_dir).uri or _header(run_dir)["uri"]


def _header(run_dir: Path) -> dict[str, Any]:
    if not is_tracked(run_dir):
        raise InputError("nothing was tracked here", file=run_dir, allowed="the folder of a search")
    header = summarise(run_dir).header
    if not header:
        raise InputError("has no whole line", file=run_dir / SPOOL, allowed="the spool of a search")
    return header


def _address(run_dir: Path, header: Mapping[str, Any], given: str | None) -> str:
    """The address to deliver to: the one given, else the search's own.

    The spool keeps no password: an address that had one is taken from MLFLOW_TRACKING_URI again.
    """
    uri = header["uri"] if given is None else resolve_uri(given, run_dir.parent)
    if given is None and "***" in uri:
        whole = os.environ.get("MLFLOW_TRACKING_URI", "")
        if display_uri(whole) != uri:
            raise InputError(
                f"{uri!r} lacks its password, which is not kept",
                key="MLFLOW_TRACKING_URI",
                allowed="the whole address",
            )
        uri = whole
    check_uri(uri)
    return uri
