"""Searches on a Ray cluster of several nodes, each in a network namespace of its own (see machines.py)."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]

SPACE = """
name: small
data: {path: DATA}
model: {backbone: {kind: mlp, hidden: [16]}}
optimizer: {kind: adamw, lr: {loguniform: [1.0e-3, 1.0e-1]}}
train: {epochs: EPOCHS, batch_size: 50}
search: {trials: TRIALS, gpus_per_worker: 0, scheduler: {kind: none}, controls: false, decode: false, SEARCH}
"""


@pytest.fixture
def write_space(tmp_path, data_file):
    def write(trials, epochs, search="refit: false"):
        text = SPACE.replace("DATA", str(data_file)).replace("SEARCH", search)
        path = tmp_path / "space.yaml"
        path.write_text(text.replace("TRIALS", str(trials)).replace("EPOCHS", str(epochs)))
        return path

    return write


@pytest.fixture(scope="module")
def room(tmp_path_factory, machines):
    if machines.WHY_NOT:
        pytest.skip(machines.WHY_NOT)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))},
        "PYTHONPATH": path,
        "COLUMNS": "200",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",  # how soon a group without room is closed
    }
    with machines.MachineRoom(tmp_path_factory.mktemp("room"), environment) as room:
        yield room


@pytest.fixture(scope="module")
def head(room):
    """The head has no CPU for workers: they are where a test puts them."""
    machine = room.machine()
    machine.start_ray(cpus=0)
    return machine


@pytest.fixture
def node(room, head):
    """`node(cpus)`: a machine that joins the cluster; it is switched off after the test."""
    machines = []

    def add(cpus=1, gpus=0):
        machine = room.machine()
        machine.start_ray(cpus, head, gpus)
        machines.append(machine)
        return machine

    yield add
    for machine in machines:
        machine.cut_the_power()


class Search:
    """`hiertune search` on a machine."""

    def __init__(self, machines, room, head, machine, folder, *args):
        self._pid_of = machines.inner
        self.run = folder / "runs" / "small"
        self._output = folder / "output"
        command = [sys.executable, "-m", "hiertune", "search", "space.yaml", *args]
        with self._output.open("w") as file:
            self.process = machine.start(
                command,
                cwd=folder,
                env=room.environment | {"RAY_ADDRESS": f"{head.address}:6379"},
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self):
        return self._output.read_text()

    def signal(self, number):
        os.kill(self._pid_of(self.process), number)

    def wait_for(self, condition, timeout_s=240):
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)

    def wait(self, timeout_s=240):
        return self.process.wait(timeout_s)

    def epoch(self, trial):
        return max(self.epochs(trial), default=0)

    def epochs(self, trial):
        curves = self.run / "curves.csv"
        if not curves.exists():
            return []
        with curves.open() as file:
            rows = [row for row in csv.DictReader(file) if row["metric"] == "train/loss"]
        return [int(row["epoch"]) for row in rows if row["trial"] == str(trial)]

    def trials(self):
        with (self.run / "trials.csv").open() as file:
            return list(csv.DictReader(file))


@pytest.fixture
def search(machines, room, head, tmp_path):
    started = []

    def start(machine, *args):
        started.append(Search(machines, room, head, machine, tmp_path, *args))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.signal(signal.SIGKILL)
            each.process.wait()


def workers_on(machine):
    """Processes there that train, by what Ray calls them."""
    return [process for process in machine.processes() if _name(process).startswith("ray::RayTrainWorker")]


def _name(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def answer(done):
    """What a script printed, between Ray's own lines."""
    assert done.returncode == 0, done.stdout + done.stderr
    return next(json.loads(line) for line in done.stdout.splitlines() if line.startswith(("[[", '{"')))


ONE_GROUP = """
import json, sys
from pathlib import Path
import ray
from ray.util.state import list_actors
from hiertune.config import TrialConfig
from hiertune.search import cluster
from hiertune.search.capacity import GroupShape
from hiertune.search.messages import Job
from hiertune.search.pool import WorkerPool

data, folder, placement = sys.argv[1:]
cluster.connect()
config = TrialConfig.model_validate({"data": {"path": data}, "train": {"epochs": 3, "batch_size": 50}})
with WorkerPool(1, GroupShape(2, 1.0, 0.0, placement), Path(folder, "ray")) as pool:
    ending = pool.run(Job("job", config, folder, test_on=("test",)))
    actors = [actor for actor in list_actors() if actor.state == "ALIVE"]
workers = [actor.node_id for actor in actors if actor.class_name == "RayTrainWorker"]
others = [actor.node_id for actor in actors if actor.class_name in ("Broker", "TrainController")]
here = ray.get_runtime_context().get_node_id()
print(json.dumps({"metrics": ending.outcome.metrics, "workers": workers, "others": others, "here": here}))
"""


def test_a_group_is_packed_or_spread_and_computes_the_same(room, head, node, data_file, tmp_path):
    node(2), node(2)
    found = {}
    for placement in ("pack", "spread"):
        done = head.run(
            [sys.executable, "-c", ONE_GROUP, data_file, tmp_path / placement, placement],
            env=room.environment | {"RAY_ADDRESS": f"{head.address}:6379"},
            capture_output=True,
            timeout=240,
        )
        found[placement] = answer(done)
    assert [len(set(each["workers"])) for each in found.values()] == [1, 2]
    for each in found.values():
        assert each["others"] == [each["here"]] * 2, (
            "what a trial needs beside workers is on the driver's node"
        )
        assert each["here"] not in each["workers"]
    # Over two nodes gloo talks by their interfaces: the host name of these machines is that of the loopback.
    assert found["spread"]["metrics"] == found["pack"]["metrics"]


AS_RAY_PLACES = """
import itertools, json, time
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from hiertune.search import cluster
from hiertune.search.capacity import GroupShape

ray.init(log_to_driver=False)
while len(cluster.node_resources()) != 3:  # those of the test before are dead, but Ray takes its time
    time.sleep(1)
found = []
for workers, (cpus, gpus), placement in itertools.product(
    (1, 2), ((1.0, 0.0), (2.0, 0.0), (0.5, 0.4), (1.0, 1.0), (0.5, 2.0)), ("pack", "spread")
):
    shape, groups = GroupShape(workers, cpus, gpus, placement), []
    while True:
        groups.append(placement_group([shape.per_worker] * workers, strategy=placement.upper()))
        if not groups[-1].wait(2):
            break
    found.append((str(shape), shape.fit(cluster.node_resources()), len(groups) - 1))
    for group in groups:
        remove_placement_group(group)
print(json.dumps(found))
"""


def test_as_many_groups_fit_as_ray_places(room, head, node):
    node(3, gpus=2), node(2, gpus=1)
    done = head.run(
        [sys.executable, "-c", AS_RAY_PLACES],
        env=room.environment | {"RAY_ADDRESS": f"{head.address}:6379"},
        capture_output=True,
        timeout=240,
    )
    found = answer(done)
    assert len(found) == 20
    for shape, fit, placed in found:
        assert fit == placed, shape


def test_nodes_go_and_come_in_the_middle_of_a_search(head, node, search, write_space):
    first, second = node(), node()
    write_space(trials=5, epochs=150)
    running = search(head)
    running.wait_for(lambda: running.epoch(0) > 5 and running.epoch(1) > 5)
    assert [len(workers_on(machine)) for machine in (first, second)] == [1, 1]

    first.cut_the_power()  # the trial it had goes on elsewhere, as soon as there is room
    running.wait_for(lambda: "is closed: the cluster has no room" in (running.run / "search.log").read_text())
    second.cut_the_power()
    running.wait_for(lambda: "waiting for nodes: a trial needs 1 workers x 1 CPU = 1 CPU" in running.output)
    third, fourth = node(), node()
    running.wait_for(lambda: workers_on(third) and workers_on(fourth))
    assert running.wait() == 0, running.output
    assert [row["state"] for row in running.trials()] == ["completed"] * 5
    for trial in range(5):
        assert running.epochs(trial) == list(range(1, 151)), "each epoch is told once"


def test_the_driver_moves_to_another_machine(node, search, write_space):
    first, second = node(), node()
    write_space(trials=3, epochs=100)
    begun = search(first)
    begun.wait_for(lambda: begun.epoch(0) > 5)
    begun.signal(signal.SIGKILL)
    begun.wait()
    moved = search(second, "--resume")
    assert moved.wait() == 0, moved.output
    assert [row["state"] for row in moved.trials()] == ["completed"] * 3


def test_a_driver_whose_own_node_dies_waits_for_it_and_goes_on(node, head, search, write_space):
    own, other = node(), node()
    write_space(trials=3, epochs=100)
    running = search(own)
    running.wait_for(lambda: running.epoch(0) > 5)
    raylet = next(each for each in own.processes() if "raylet/raylet " in _name(each))
    raylet.kill()
    running.wait_for(lambda: "the Ray node of this machine died" in running.output)
    own.start_ray(1, head)
    assert running.wait() == 0, running.output
    assert [row["state"] for row in running.trials()] == ["completed"] * 3
    assert other


@pytest.fixture
def parts_of():
    """`parts_of(process, name)`: the processes of its Ray whose command line has `name`."""

    def find(process, name):
        return [each for each in psutil.Process(process.pid).children(recursive=True) if name in _name(each)]

    return find


def test_a_search_outlives_its_ray(start_hiertune, write_space, tmp_path, parts_of):
    """The broker, the raylet and the GCS are killed in one search, one after the other."""
    run = tmp_path / "runs" / "small"
    process = start_hiertune("search", write_space(trials=3, epochs=1000))

    def wait_for(condition):
        deadline = time.monotonic() + 180
        while not condition():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def epochs():
        curves = run / "curves.csv"
        return curves.read_text().count("train/loss") if curves.exists() else 0

    for part, said in (
        ("ray::Broker", None),  # Ray starts it again
        ("raylet/raylet ", "the Ray node of this machine died"),
        ("gcs/gcs_server ", "Ray's head (its GCS) is gone"),
    ):
        before = epochs()
        wait_for(lambda before=before: epochs() >= before + 10)
        parts_of(process, part)[0].kill()
        if said is not None:
            wait_for(lambda said=said: said in (run / "search.log").read_text())
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert output.count("the search begins anew from its ledger") == 2
    with (run / "trials.csv").open() as file:
        assert [row["state"] for row in csv.DictReader(file)] == ["completed"] * 3


def test_a_job_is_submitted_stopped_and_submitted_again(room, head, node, write_space, tmp_path):
    node()
    space = write_space(trials=3, epochs=200)
    jobs = room.environment | {"RAY_ADDRESS": "http://127.0.0.1:8265"}

    def ray(*args):
        program = [sys.executable, "-m", "ray.scripts.scripts", "job", *args]
        return head.run(program, env=jobs, capture_output=True, timeout=240)

    def submit(*args):
        command = [
            sys.executable,
            ROOT / "scripts" / "cluster" / "submit",
            space,
            "--runs",
            tmp_path / "runs",
        ]
        return head.run([*command, *args], env=jobs, capture_output=True, timeout=240)

    begun = submit("--no-wait")
    assert begun.returncode == 0, begun.stdout + begun.stderr
    job = begun.stdout.split("Job '")[1].split("'")[0]
    curves, deadline = tmp_path / "runs" / "small" / "curves.csv", time.monotonic() + 240
    while not curves.exists() or curves.read_text().count("train/loss") < 10:
        assert time.monotonic() < deadline, ray("logs", job).stdout
        time.sleep(0.1)
    ray("stop", job)
    log = ray("logs", job).stdout
    again = (tmp_path / "runs" / "small" / "resume.sh").read_text()
    assert again.endswith(f"/scripts/cluster/submit {space} --runs {tmp_path}/runs\n")
    assert f"go on with:\n  {again}" in log, log

    done = head.run([*shlex.split(again), "--trials", "2"], env=jobs, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "On the test split, read once" in done.stdout
    assert "\x1b[?25l" not in done.stdout, "no live display in a log"
    with (tmp_path / "runs" / "small" / "trials.csv").open() as file:
        assert [row["state"] for row in csv.DictReader(file)][:2] == ["completed"] * 2
