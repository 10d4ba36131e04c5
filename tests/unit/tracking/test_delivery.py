"""Delivery into real MLflow stores: everything arrives, once, whatever is cut off."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hiertune.errors import InputError
from hiertune.tracking import Delivery, Tracker, delivery, resolve_uri, sync, tracker
from hiertune.tracking.spool import STATE, summarise

pytestmark = pytest.mark.slow

ROOT = Path(tracker.__file__).resolve().parents[2]
TRIALS, STEPS, METRICS = 4, 30, 20


@pytest.fixture
def run_dir(tmp_path, empty_store, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    folder = tmp_path / "s1"
    folder.mkdir()
    return folder


@pytest.fixture
def uri(run_dir):
    return resolve_uri(None, run_dir.parent)


def write_search(tracked, trials=TRIALS, steps=STEPS):
    """A search's worth of calls: trials interleaved as they are when they run at once."""
    tracked.search_started({"search.trials": trials, "search.sampler.kind": "tpe"}, {"hiertune.data": "d"})
    for trial in range(trials):
        tracked.trial_started(trial, {"loss.alpha": trial / 10, "model.backbone.hidden": [64, 32]})
    for step in range(1, steps + 1):
        for trial in range(trials):
            tracked.log(trial, step, values(trial, step), timestamp=1000.0 + step)
    for trial in range(trials):
        state = ["completed", "pruned", "failed", "interrupted"][trial % 4]
        tracked.trial_ended(trial, state, None if state == "completed" else f"because {trial}")
    tracked.search_ended("completed", {"test/accuracy/genus": 0.75}, {"hiertune.winner": 0})


def values(trial, step):
    return {f"val/accuracy/level {k}": trial + step / 7 + k / 1000 for k in range(METRICS)}


def runs_of(uri):
    """(the search's run, {trial: run}) of the only search in a store."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("hiertune")
    found = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in found if run.data.tags["hiertune.kind"] == "search"]
    trials = [run for run in found if run.data.tags["hiertune.kind"] == "trial"]
    by_number = {int(run.data.tags["hiertune.trial"]): run for run in trials}
    assert len(by_number) == len(trials) == len(found) - 1
    return client, parent, by_number


def check_search(uri, trials=TRIALS, steps=STEPS):
    """Exactly what `write_search` wrote is there: nothing missing, nothing twice."""
    client, parent, by_number = runs_of(uri)
    assert parent.info.run_name == "s1"
    assert parent.info.status == "FINISHED"
    assert parent.data.params == {"search.trials": str(trials), "search.sampler.kind": "tpe"}
    assert parent.data.metrics == {"test/accuracy/genus": 0.75}
    expected_tags = {"hiertune.search": "s1", "hiertune.data": "d", "hiertune.winner": "0"}
    assert expected_tags.items() <= parent.data.tags.items()
    assert sorted(by_number) == list(range(trials))
    for trial, run in by_number.items():
        state = ["completed", "pruned", "failed", "interrupted"][trial % 4]
        assert run.info.status == ["FINISHED", "KILLED", "FAILED", "KILLED"][trial % 4]
        assert run.info.run_name == f"trial-{trial:03d}"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["hiertune.search"] == "s1"
        assert run.data.tags["hiertune.state"] == state
        assert run.data.tags.get("hiertune.reason") == (None if trial % 4 == 0 else f"because {trial}")
        assert run.data.params == {
            "loss.alpha": str(trial / 10),
            "model.backbone.hidden": "[64, 32]",
        }
        assert set(run.data.metrics) == set(values(0, 0))
        for name in list(values(0, 0))[:: METRICS - 1]:
            history = client.get_metric_history(run.info.run_id, name)
            assert [(m.step, m.timestamp, m.value) for m in history] == [
                (step, 1_000_000 + 1000 * step, values(trial, step)[name]) for step in range(1, steps + 1)
            ]


def total_rows(uri):
    import sqlite3

    with sqlite3.connect(uri.removeprefix("sqlite:///")) as database:
        return database.execute("select count(*) from metrics").fetchone()[0]


ALL_ROWS = TRIALS * STEPS * METRICS + 1


def test_a_search_arrives_whole_and_its_process_never_imports_mlflow(run_dir, uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", "f" * 32)  # would beat the parent run in MLflow's own fluent calls
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "elsewhere")
    code = (
        "import sys; from pathlib import Path; from test_delivery import *\n"
        "tracked = Tracker.start(Path(sys.argv[1]), sys.argv[2], 'hiertune', 's1')\n"
        "write_search(tracked); print(tracked.close(60)); print('mlflow' in sys.modules)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    command = [sys.executable, "-c", code, str(run_dir), uri]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    status, imported = done.stdout.splitlines()
    total = delivery(run_dir).total
    assert status == str(Delivery(total, total))
    assert imported == "False"
    check_search(uri)
    assert total_rows(uri) == ALL_ROWS
    assert not (ROOT / "mlruns").exists()


def test_a_lost_record_or_another_sync_doubles_nothing(run_dir, uri):
    tracked = Tracker.start(run_dir, uri, "hiertune", "s1")
    write_search(tracked)
    assert tracked.close(60).complete
    (run_dir / STATE).unlink()
    assert not delivery(run_dir).complete
    for _ in range(2):
        assert sync(run_dir).complete
        check_search(uri)
        assert total_rows(uri) == ALL_ROWS


def test_an_emptied_store_is_filled_again(run_dir, uri, empty_store):
    tracked = Tracker.start(run_dir, uri, "hiertune", "s1")
    write_search(tracked)
    assert tracked.close(60).complete
    shutil.copy(empty_store, run_dir.parent / "mlflow.db")
    resumed = Tracker.start(run_dir, uri, "hiertune", "s1", resume=True)
    resumed.log(None, 1, {"best": 1.0})
    assert resumed.close(60).complete
    assert total_rows(uri) == ALL_ROWS + 1


def test_delivery_killed_in_midway_loses_and_doubles_nothing(run_dir, uri, monkeypatch):
    monkeypatch.setattr(tracker, "RESTART_AFTER", 0.0)
    steps = 400
    tracked = Tracker.start(run_dir, uri, "hiertune", "s1")
    write_search(tracked, steps=steps)
    kills = 0
    for share in (0.05, 0.5):
        while (status := tracked.status()).delivered < share * status.total:
            time.sleep(0.02)
        tracked._process.kill()
        tracked._process.wait()
        kills += not status.complete
    assert kills == 2  # it was really in the middle
    assert tracked.close(120).complete
    assert tracked.status().error is None
    check_search(uri, steps=steps)
    assert total_rows(uri) == TRIALS * steps * METRICS + 1


def test_a_killed_search_leaves_no_run_at_work_and_goes_on(run_dir, uri):
    code = (
        "import os, signal, sys, time; from hiertune.tracking import Tracker\n"
        "tracked = Tracker.start(sys.argv[1], sys.argv[2], 'hiertune', 's1')\n"
        "tracked.search_started({'search.trials': 2})\n"
        "for trial in range(2): tracked.trial_started(trial, {'lr': 0.1})\n"
        "tracked.log(0, 1, {'a': 1.0}); tracked.trial_ended(0, 'completed')\n"
        'os.write(tracked._spool, b\'{"op":"log","t":1,\')\n'  # cut off in mid-write
        "print(tracked._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(run_dir), uri]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while not (summarise(run_dir).closed and delivery(run_dir).complete):
        assert time.monotonic() < deadline, (run_dir / "tracking.log").read_text()
        time.sleep(0.2)
    _, parent, trials = runs_of(uri)
    states = [(run.info.status, run.data.tags["hiertune.state"]) for run in (parent, trials[0], trials[1])]
    assert states == [("KILLED", "interrupted"), ("FINISHED", "completed"), ("KILLED", "interrupted")]

    resumed = Tracker.start(run_dir, uri, "hiertune", "s1", resume=True)
    resumed.search_started({"search.trials": 3})
    resumed.trial_started(1, {"lr": 0.1})
    resumed.log(1, 1, {"a": 2.0})
    resumed.trial_ended(1, "completed")
    resumed.search_ended("completed")
    assert resumed.close(60) == Delivery(delivery(run_dir).total, delivery(run_dir).total)
    _, parent, trials = runs_of(uri)
    assert sorted(trials) == [0, 1]
    assert trials[1].info.status == parent.info.status == "FINISHED"
    assert trials[1].data.metrics == {"a": 2.0}
    assert not any("hiertune.reason" in run.data.tags for run in (parent, trials[1])), "no longer killed"
    assert parent.data.params == {"search.trials": "2"}  # MLflow's parameters never change
    assert parent.data.tags["hiertune.now/search.trials"] == "3"


def test_odd_values_names_sizes_and_files(run_dir, uri):
    (run_dir / "model").mkdir()
    (run_dir / "model" / "model.json").write_text("{}")
    (run_dir / "space.yaml").write_text("a: 1\n")
    tracked = Tracker.start(run_dir, uri, "hiertune", "s1")
    long = {f"key{k}": "ü" * 10_000 for k in range(150)}
    tracked.search_started({**long, "empty": "", "none": None, "odd+key": True}, {"big": "x" * 9000})
    tracked.log(None, 1, {"a": math.nan, "b": -math.inf, "c/../d": 1.0, "e": 1.5})
    tracked.artifact(None, run_dir / "space.yaml", "config")
    tracked.artifact(None, run_dir / "model")
    tracked.artifact(None, run_dir / "gone")
    tracked.log(None, 2, {"e": 2.5})
    tracked.search_ended("failed")
    status = tracked.close(60)
    assert (status.total - status.delivered, "gone" in status.error) == (1, True)
    client, parent, _ = runs_of(uri)
    assert parent.data.params["key149"] == "ü" * 5999 + "…"
    assert (parent.data.params["empty"], parent.data.params["none"]) == ("", "null")
    assert len(parent.data.params) == 153
    assert parent.data.tags["big"] == "x" * 7999 + "…"
    assert parent.data.tags["hiertune.nonfinite/a"] == "nan at step 1"
    assert parent.data.tags["hiertune.nonfinite/b"] == "-inf at step 1"
    assert parent.data.metrics["e"] == 2.5
    assert len(parent.data.metrics) == 2
    files = [file.path for file in client.list_artifacts(parent.info.run_id)]
    assert files == ["config", "model"]
    assert client.list_artifacts(parent.info.run_id, "model")[0].path == "model/model.json"
    assert (run_dir.parent / "mlartifacts").is_dir()


def test_a_run_deleted_by_hand_holds_up_nothing(run_dir, uri):
    tracked = Tracker.start(run_dir, uri, "hiertune", "s1")
    tracked.search_started({})
    tracked.trial_started(0, {})
    tracked.trial_started(1, {})
    while not tracked.status().complete:
        time.sleep(0.1)
    client, _, trials = runs_of(uri)
    client.delete_run(trials[0].info.run_id)
    tracked.log(0, 1, {"a": 1.0, "b": 1.0})
    tracked.log(1, 1, {"a": 1.0})
    status = tracked.close(60)
    assert (status.total - status.delivered, "refused for good" in status.error) == (2, True)
    assert client.get_run(trials[1].info.run_id).data.metrics == {"a": 1.0}


def test_a_resume_elsewhere_takes_everything_along(run_dir, uri, empty_store):
    tracked = Tracker.start(run_dir, uri, "hiertune", "s1")
    write_search(tracked)
    assert tracked.close(60).complete
    shutil.copy(empty_store, run_dir.parent / "other.db")
    other = f"sqlite:///{run_dir.parent}/other.db"
    assert Tracker.start(run_dir, other, "hiertune", "s1", resume=True).close(60).complete
    check_search(other)
    assert total_rows(uri) == total_rows(other) == ALL_ROWS


def test_a_server_that_comes_up_late_gets_everything_once(run_dir, make_server):
    server = make_server(run_dir.parent)
    uri = server.uri
    tracked = Tracker.start(run_dir, uri, "hiertune", "s1")
    write_search(tracked)
    (run_dir / "space.yaml").write_text("a: 1\n")
    tracked.artifact(None, run_dir / "space.yaml")
    while tracked.status().error is None:
        time.sleep(0.1)
    assert tracked.status().error == f"{uri} can't be reached"
    assert tracked.status().delivered == 0
    server.start()
    try:
        assert tracked.close(120) == Delivery(delivery(run_dir).total, delivery(run_dir).total)
        check_search(uri)
        client, parent, _ = runs_of(uri)
        assert [file.path for file in client.list_artifacts(parent.info.run_id)] == ["space.yaml"]
    finally:
        server.kill()
    assert total_rows(f"sqlite:///{run_dir.parent}/mlflow.db") == ALL_ROWS


def test_sync_gives_up_in_time_and_says_why_and_no_password_is_kept(run_dir, make_server, monkeypatch):
    uri = make_server(run_dir).uri.replace("//", "//me:secret@")
    shown = uri.replace("secret", "***")
    tracked = Tracker.start(run_dir, uri, "hiertune", "s1")
    tracked.log(None, 1, {"a": 1.0})
    tracked.close(0)
    with pytest.raises(InputError, match="lacks its password") as refused:
        sync(run_dir, patience=1.0)
    assert "secret" not in str(refused.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    left = sync(run_dir, patience=1.0)
    assert (left.delivered, left.total, left.error) == (0, 1, f"{shown} can't be reached")
    assert abs(left.since - time.time()) < 120
    for file in run_dir.iterdir():
        assert "secret" not in file.read_text(), file.name
