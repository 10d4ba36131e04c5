"""A real MLflow server, and small real searches that it leaves alone for their middle half."""

from __future__ import annotations

import csv
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
STARTUP_S = 150  # of a server, on a busy machine

SPACE = """
name: NAME
data: {path: data.h5}
model: {backbone: {kind: mlp, hidden: [32]}, head: {kind: linear}}
optimizer: {kind: adamw, lr: {loguniform: [1.0e-3, 1.0e-1]}}
train: {epochs: EPOCHS, batch_size: 100}
search: {trials: TRIALS, scheduler: {kind: none}, workers_per_trial: 1, refit: false, controls: false}
tracking: {experiment: NAME}
"""


class Server:
    """`mlflow server` over an SQLite file in `folder`, on one port for all its life."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.startup_s = 0.0
        """How long the newest start took until the server answered; 0: it has not yet."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def start(self) -> Server:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
        command += ["--port", str(self.port), "--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # eight processes of it
        self._begun, self.startup_s = time.monotonic(), 0.0
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        return self

    def wait(self) -> Server:
        """Until it answers."""
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() - self._begun > STARTUP_S:
                raise RuntimeError((self._folder / "server.log").read_text())
            time.sleep(0.1)
        return self

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1):  # nosec B310 - own server
                self.startup_s = self.startup_s or time.monotonic() - self._begun
                return True
        except OSError:
            return False

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # its own session: the server and its workers
            self._process.wait()


def write_data(folder: Path) -> None:
    """400 rows of 20 features around the centres of 8 genera in 4 families and 2 domains."""
    from hiertune import Taxonomy
    from hiertune.data import write_dataset

    rng = np.random.default_rng(0)
    lineages = [(f"d{i // 4}", f"f{i // 2}", f"g{i}") for i in rng.integers(0, 8, 400)]
    taxonomy = Taxonomy.from_lineages(lineages, ["domain", "family", "genus"])
    labels = taxonomy.encode(lineages)
    inputs = (rng.normal(size=(8, 20))[labels[:, -1]] + rng.normal(size=(400, 20))).astype(np.float32)
    write_dataset(folder / "data.h5", inputs, labels, taxonomy, [f"row{i}" for i in range(400)])


def search(
    folder: Path, name: str, trials: int, epochs: int, server: Server, stand_in: Server | None
) -> float:
    """Wall seconds of `hiertune search`, from its start to its end.

    The server is killed when a quarter of all epochs is done, and started so that it answers again when
    three quarters are, if it starts as fast as last time. To start one takes CPU seconds that the search
    then lacks, so with a `stand_in` that one is killed and started instead: the search is undisturbed.
    """
    text = SPACE.replace("NAME", name).replace("EPOCHS", str(epochs)).replace("TRIALS", str(trials))
    (folder / f"{name}.yaml").write_text(text)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    path = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    environment |= {"PYTHONPATH": path, "MLFLOW_TRACKING_URI": server.uri, "COLUMNS": "200"}
    command = [sys.executable, "-m", "hiertune", "search", f"{name}.yaml"]
    cut, curves = stand_in or server, folder / "runs" / name / "curves.csv"
    begun = time.perf_counter()
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)

    def done() -> float:
        return _epochs_of(curves) / (trials * epochs)

    def wait_until(condition: Callable[[], bool]) -> None:
        while process.poll() is None and not condition():
            time.sleep(0.1)

    wait_until(lambda: done() >= 0.25)
    cut.kill()
    gone, share, startup_s = time.monotonic(), done(), cut.startup_s

    def it_is_time() -> bool:
        per_second = (done() - share) / max(0.1, time.monotonic() - gone)
        return done() + per_second * startup_s >= 0.75

    wait_until(it_is_time)
    cut.start()
    wait_until(cut.answers)
    code = process.wait()
    seconds = time.perf_counter() - begun
    cut.wait()
    if code:
        raise RuntimeError((folder / f"{name}.log").read_text())
    return seconds


def _epochs_of(curves: Path) -> int:
    try:
        return curves.read_bytes().count(b",train/loss,")
    except FileNotFoundError:
        return 0


def compare(folder: Path, name: str, server: Server) -> Counter:
    """What is in MLflow against `curves.csv`: points `expected`, `there` (once and equal), `wrong` (twice,
    of another value, or not expected), and runs still `open`."""
    from mlflow.tracking import MlflowClient

    with (folder / "runs" / name / "curves.csv").open(newline="") as file:
        rows = [
            (row["trial"], row["metric"], int(row["epoch"]), float(row["value"]))
            for row in csv.DictReader(file)
        ]
    expected = {(trial, metric, epoch): value for trial, metric, epoch, value in rows if math.isfinite(value)}
    client = MlflowClient(tracking_uri=server.uri)
    runs = client.search_runs([client.get_experiment_by_name(name).experiment_id])
    found = Counter()
    for run in runs:
        found["open"] += run.info.status == "RUNNING"
        trial = run.data.tags.get("hiertune.trial")
        if trial is None:
            continue
        for metric in run.data.metrics:
            history = client.get_metric_history(run.info.run_id, metric)
            steps = Counter(point.step for point in history)
            for point in history:
                once = steps[point.step] == 1 and expected.get((trial, metric, point.step)) == point.value
                found["there" if once else "wrong"] += 1
    return found + Counter(expected=len(expected))
