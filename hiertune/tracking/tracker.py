"""The search's side of tracking."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hiertune.errors import InputError
from hiertune.tracking.spool import (
    LOG,
    SPOOL,
    Delivery,
    State,
    count,
    cut_torn_line,
    delivery,
    encode,
    summarise,
)

RESTART_AFTER = 30.0  # seconds between restarts of a delivery process that died
TAKEN_OVER = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_ACTIVE_MODEL_ID")


class Tracker:
    """The search's end of tracking. Its methods take microseconds, raise nothing of MLflow's or the
    disk's, and may be called from any thread. `trial=None` is the search itself (the parent run).
    """

    def __init__(self, run_dir: Path, header: Mapping[str, Any], total: int) -> None:
        self._run_dir = run_dir
        self._lock = threading.Lock()
        self._total = total
        self._closed = False
        self._lost = 0
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        self._spool = os.open(run_dir / SPOOL, flags, 0o600)  # the address may hold a password
        self._write("open", **header, pid=os.getpid())
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
        uid, total = uuid.uuid4().hex, 0
        if (run_dir / SPOOL).exists():
            if not resume:
                raise FileExistsError(run_dir / SPOOL)
            cut_torn_line(run_dir / SPOOL)
            before = summarise(run_dir)
            uid, total = before.header.get("uid", uid), before.total
        return cls(run_dir, {"uri": uri, "experiment": experiment, "search": search_name, "uid": uid}, total)

    def search_started(self, params: Mapping[str, Any], tags: Mapping[str, Any] | None = None) -> None:
        """Parameters by key path, in MLflow as written in YAML."""
        self._write("start", None, params=params, tags=tags or {})

    def trial_started(
        self, trial: int, params: Mapping[str, Any], tags: Mapping[str, Any] | None = None
    ) -> None:
        """A trial that was interrupted may be started again: its run goes on."""
        self._write("start", trial, params=params, tags=tags or {})

    def log(
        self, trial: int | None, step: int, metrics: Mapping[str, float], timestamp: float | None = None
    ) -> None:
        """Metrics of one step; `timestamp` in seconds since 1970, by default now."""
        numbers = {name: float(value) for name, value in metrics.items()}
        self._write("log", trial, timestamp, step=int(step), metrics=numbers)

    def trial_ended(
        self, trial: int, state: str, reason: str | None = None, tags: Mapping[str, str] | None = None
    ) -> None:
        """`state`: completed, pruned, failed or interrupted."""
        self._write(
            "end",
            trial,
            state=state,
            tags={**(tags or {}), **({"hiertune.reason": reason} if reason else {})},
        )

    def artifact(self, trial: int | None, path: str | Path, artifact_path: str | None = None) -> None:
        """A file, or a folder with all that is in it. It is read at delivery: leave it where it is."""
        path = Path(path).resolve()
        if path.is_relative_to(self._run_dir):  # so that the folder may be moved before `sync`
            path = path.relative_to(self._run_dir)
        self._write("artifact", trial, path=str(path), artifact_path=artifact_path)

    def search_ended(
        self, state: str, metrics: Mapping[str, float] | None = None, tags: Mapping[str, Any] | None = None
    ) -> None:
        """`state`: completed, failed or interrupted."""
        self.log(None, 0, metrics or {})
        self._write("end", None, state=state, tags=tags or {})

    def status(self) -> Delivery:
        """How far delivery has got; restarts a delivery process that died. Cheap enough to poll."""
        code = self._process.poll()
        if code is not None and not self._closed and time.monotonic() - self._launched > RESTART_AFTER:
            self._launch()
        progress = State.load(self._run_dir).progress(self._total + self._lost)
        if self._lost:
            return replace(progress, error=f"{self._run_dir / SPOOL} could not be written: is the disk full?")
        if code and not self._closed:
            return replace(progress, error=f"delivery ended with code {code}; see {self._run_dir / LOG}")
        return progress

    def close(self, timeout: float) -> Delivery:
        """End the spool and wait up to `timeout` seconds for its delivery; `sync` delivers what is left."""
        deadline = time.monotonic() + timeout
        if not self._closed:
            self._write("close")
            self._closed = True
            os.close(self._spool)
        if self._process.poll():
            self._launch()
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()  # delivery is made to be cut off anywhere
            self._process.wait()
        return self.status()

    def _launch(self) -> None:
        self._process = launch_delivery(self._run_dir)
        self._launched = time.monotonic()

    def _write(
        self, op: str, trial: int | None = None, timestamp: float | None = None, **content: Any
    ) -> None:
        now = time.time() if timestamp is None else timestamp
        record = {"op": op, "t": round(now * 1000), "trial": trial, **content}
        size = count(record)
        with self._lock:
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


def launch_delivery(run_dir: Path, *options: str) -> subprocess.Popen[bytes]:
    """A delivery process in a session of its own, so that Ctrl-C in the terminal leaves it at work."""
    env = {key: value for key, value in os.environ.items() if key not in TAKEN_OVER}
    env["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"  # retries are ours: MLflow's take minutes per call
    env["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "30"
    env.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    package_root = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, env.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "hiertune.tracking", "deliver", str(run_dir / SPOOL)]
    with (run_dir / LOG).open("ab") as log:
        return subprocess.Popen(
            [*command, "--parent", str(os.getpid()), *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=env,
            start_new_session=True,
        )


def sync(run_dir: Path, timeout: float = 60.0) -> Delivery:
    """Deliver what a search left in its spool; gives up after `timeout` seconds without success.

    Raises:
        InputError: nothing was tracked in this folder.
    """
    run_dir = Path(run_dir).resolve()
    if not (run_dir / SPOOL).is_file():
        raise InputError("nothing was tracked here", file=run_dir, allowed="the folder of a search")
    code = launch_delivery(run_dir, "--drain", "--patience", str(timeout)).wait()
    progress = delivery(run_dir)
    return (
        replace(progress, error=f"delivery ended with code {code}; see {run_dir / LOG}") if code else progress
    )
