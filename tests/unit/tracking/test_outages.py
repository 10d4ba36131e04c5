"""A real MLflow server behind a proxy that does to it what networks and operators do."""

import base64
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hiertune.errors import InputError
from hiertune.tracking import Delivery, Tracker, at_work, delivery, sync, tracker
from hiertune.tracking.spool import summarise

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(tracker.__file__).resolve().parents[2]
PATIENCE = 150  # the machine may be busy
TRIALS = 3


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(tracker, "REQUEST_TIMEOUT", 8)
    for name in ("URI", "USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    folder = tmp_path / "s1"
    folder.mkdir()
    return folder


class Search:
    """Logs and knows what it logged; `check` compares that with a store."""

    def __init__(self, run_dir, uri, experiment):
        self.run_dir, self.experiment = run_dir, experiment
        self.points = {trial: [] for trial in range(TRIALS)}
        self.tracker = Tracker.start(run_dir, uri, experiment, "s1")
        self.tracker.search_started({"search.trials": TRIALS})
        for trial in self.points:
            self.tracker.trial_started(trial, {"optimizer.lr": trial / 10})

    def epochs(self, count=1):
        for _ in range(count):
            for trial, points in self.points.items():
                step = len(points) + 1
                metrics = {f"val/accuracy/{k}": trial + step / 7 + k for k in range(3)}
                self.tracker.log(trial, step, metrics, timestamp=1000.0 + step)
                points.append(metrics)

    def end(self):
        for trial in self.points:
            self.tracker.trial_ended(trial, "completed")
        self.tracker.search_ended("completed")

    def arrived(self):
        wait_until(lambda: self.tracker.status().complete, self.run_dir)

    def fails(self):
        wait_until(lambda: self.tracker.status().since is not None, self.run_dir)
        return self.tracker.status()

    def check(self, uri, status="FINISHED"):
        """Every run, and every metric at every step, is there exactly once."""
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=uri)
        found = client.search_runs([client.get_experiment_by_name(self.experiment).experiment_id])
        by_number = {run.data.tags.get("hiertune.trial", ""): run for run in found}
        assert sorted(by_number) == sorted(["", *map(str, self.points)])
        assert len(found) == len(by_number), "a run is there twice"
        assert {run.info.status for run in found} == {status}
        for trial, points in self.points.items():
            run = by_number[str(trial)]
            assert run.data.params == {"optimizer.lr": str(trial / 10)}
            assert run.data.tags["mlflow.parentRunId"] == by_number[""].info.run_id
            for name in points[0]:
                history = client.get_metric_history(run.info.run_id, name)
                assert [(m.step, m.timestamp, m.value) for m in history] == [
                    (step, 1_000_000 + 1000 * step, metrics[name]) for step, metrics in enumerate(points, 1)
                ]


def wait_until(condition, run_dir, seconds=PATIENCE):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, (run_dir / "tracking.log").read_text()
        time.sleep(0.05)


LOGIN = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
SAID = {
    "gone": "can't be reached",
    "hang": "does not answer",
    "cut": "breaks off in its answers",
    "drop": "can't be reached",
    500: "answers 500 Internal Server Error",
    429: "answers 429 Too Many Requests",
    400: "answers 400 Bad Request",  # not MLflow's own: something in between said so
    401: f"refused the login (401): {LOGIN}",
    403: f"refused the login (403): {LOGIN}",
}


def test_a_search_goes_through_every_outage_and_all_of_it_arrives_once(run_dir, proxy):
    search = Search(run_dir, proxy.uri, "outages")
    for fault, said in SAID.items():
        search.epochs(2)
        search.arrived()
        assert search.tracker.status().error is None
        before = time.time()
        proxy.fault = fault
        search.epochs(2)
        status = search.fails()
        assert status.error == f"{proxy.uri} {said}"
        assert status.total - status.delivered == 2 * TRIALS * 3
        assert before <= status.since <= time.time()
        first = status.since
        search.epochs()
        time.sleep(1)  # other attempts fail
        status = search.tracker.status()
        assert (status.since, status.total - status.delivered) == (first, 3 * TRIALS * 3)
        proxy.fault = None
    search.end()
    status = search.tracker.close(PATIENCE)
    assert status == Delivery(status.total, status.total)
    search.check(proxy.uri)


def test_a_network_that_fails_again_and_again_doubles_nothing(run_dir, proxy):
    chance = random.Random(0)
    proxy.choose = lambda: chance.choice(["cut", "drop", 500, "drop"]) if chance.random() < 0.15 else None
    search = Search(run_dir, proxy.uri, "chaos")
    search.epochs(10)
    for name in ("best.yaml", "space.yaml"):
        (run_dir / name).write_text("a: 1\n")
        search.tracker.artifact(None, run_dir / name)
    search.end()
    status = search.tracker.close(PATIENCE)
    assert status.complete, status
    proxy.choose = None
    search.check(proxy.uri)

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=proxy.uri)
    experiment = client.get_experiment_by_name("chaos").experiment_id
    (parent,) = client.search_runs([experiment], "tags.`hiertune.kind` = 'search'")
    assert [file.path for file in client.list_artifacts(parent.info.run_id)] == ["best.yaml", "space.yaml"]


def test_a_server_that_never_comes_back_is_not_waited_for(run_dir, proxy):
    proxy.fault = "gone"
    search = Search(run_dir, proxy.uri, "never")
    search.epochs(3)
    wait_until(lambda: search.tracker.status().error is not None, run_dir)
    search.end()
    left = search.tracker.close(0.5)
    assert (left.delivered, left.error) == (0, f"{proxy.uri} can't be reached")
    assert not at_work(run_dir)
    proxy.fault = None
    done = sync(run_dir)
    assert done == Delivery(left.total, left.total)
    search.check(proxy.uri)


def test_another_and_empty_store_behind_the_same_address_gets_everything(
    run_dir, proxy, make_server, empty_store, tmp_path
):
    search = Search(run_dir, proxy.uri, "emptied")
    search.epochs(2)
    search.arrived()
    (tmp_path / "other").mkdir()
    shutil.copy(empty_store, tmp_path / "other" / "mlflow.db")
    other = make_server(tmp_path / "other").start().wait()
    try:
        proxy.backend = other.port  # between two requests: no request fails
        search.epochs(2)
        search.end()
        status = search.tracker.close(PATIENCE)
        assert status == Delivery(status.total, status.total)
        search.check(other.uri)
    finally:
        other.kill()


def test_a_refused_login_is_told_and_mended_by_the_environment(run_dir, proxy, monkeypatch):
    word = base64.b64encode(b"me:open sesame").decode()
    proxy.login = f"Basic {word}"
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "open barley")
    search = Search(run_dir, proxy.uri, "login")
    search.epochs(2)
    wait_until(lambda: search.tracker.status().error == f"{proxy.uri} {SAID[401]}", run_dir)
    search.end()
    assert search.tracker.close(0).delivered == 0
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "open sesame")
    assert sync(run_dir).complete
    search.check(proxy.uri)
    for file in run_dir.iterdir():
        text = file.read_text()
        assert not any(secret in text for secret in (word, "open sesame", "open barley")), file.name


def test_sync_while_the_search_runs_waits_for_its_own_delivery(run_dir, proxy, server):
    search = Search(run_dir, proxy.uri, "running")
    search.epochs(2)
    wait_until(lambda: at_work(run_dir), run_dir)
    assert sync(run_dir).complete
    assert not summarise(run_dir).closed
    with pytest.raises(InputError, match="the search still runs, and delivers elsewhere"):
        sync(run_dir, server.uri)
    search.check(proxy.uri, status="RUNNING")
    search.epochs(2)
    search.end()
    assert search.tracker.close(PATIENCE).complete
    search.check(proxy.uri)


def test_sync_goes_elsewhere_after_the_search_and_from_another_folder(run_dir, proxy, server, tmp_path):
    proxy.fault = "gone"
    search = Search(run_dir, proxy.uri, "moved")
    search.epochs(2)
    (run_dir / "best.yaml").write_text("a: 1\n")
    search.tracker.artifact(None, run_dir / "best.yaml")
    search.end()
    search.tracker.close(0)
    shutil.move(run_dir, tmp_path / "elsewhere")  # as to another machine
    done = sync(tmp_path / "elsewhere", server.uri)
    assert done == Delivery(done.total, done.total)
    search.check(server.uri)


def test_a_search_that_was_killed_with_its_delivery_leaves_no_run_at_work(run_dir, server):
    code = (
        "import os, signal, sys, time; from hiertune.tracking import Tracker\n"
        "tracked = Tracker.start(sys.argv[1], sys.argv[2], 'both killed', 's1')\n"
        "tracked.search_started({}); tracked.trial_started(0, {}); tracked.log(0, 1, {'a': 1.0})\n"
        "while not tracked.status().complete: time.sleep(0.1)\n"
        "tracked.log(0, 2, {'a': 2.0}); tracked._process.kill(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", code, str(run_dir), server.uri]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False, timeout=PATIENCE)
    assert not summarise(run_dir).closed
    done = sync(run_dir)
    assert done == Delivery(done.total, done.total)

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=server.uri)
    runs = client.search_runs([client.get_experiment_by_name("both killed").experiment_id])
    assert [run.info.status for run in runs] == ["KILLED", "KILLED"]
    assert {run.data.tags["hiertune.reason"] for run in runs} == {"the search was killed"}


def test_no_network_call_happens_in_the_process_of_the_search(run_dir, proxy):
    proxy.fault = "hang"
    code = (
        "import sys, time; calls = []\n"
        "sys.addaudithook(lambda event, _: calls.append(event) if event.startswith('socket.') else None)\n"
        "from hiertune.tracking import Tracker\n"
        "tracked = Tracker.start(sys.argv[1], sys.argv[2], 'hang', 's1')\n"
        "tracked.search_started({}); tracked.trial_started(0, {})\n"
        "for step in range(1000): tracked.log(0, step, {'a': 1.0}); tracked.status()\n"
        "while tracked.status().error is None: time.sleep(0.1)\n"
        "tracked.trial_ended(0, 'completed'); tracked.search_ended('completed')\n"
        "print(tracked.close(0.1).error); print(calls)\n"
    )
    command = [sys.executable, "-c", code, str(run_dir), proxy.uri]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=2 * PATIENCE)
    assert done.stdout.splitlines() == [f"{proxy.uri} does not answer", "[]"]
    assert delivery(run_dir).delivered == 0
