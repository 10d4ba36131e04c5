"""Real faults of real workers: each becomes what it is called, and changes no number.

Everything is done to the processes from outside: signals, limits, damaged files, full disks.
"""

import contextlib
import os
import re
import resource
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.util import placement_group_table

from hiertune._database import Place
from hiertune.config import DataConfig, TrialConfig
from hiertune.search import cluster
from hiertune.search.capacity import GroupShape
from hiertune.search.follower import Follower
from hiertune.search.ledger import Ledger
from hiertune.search.listeners import Listeners
from hiertune.search.messages import Failed, Finished, Job, Reported
from hiertune.search.pool import WorkerPool
from hiertune.search.searcher import LedgerSearcher
from hiertune.search.trainable import TrialActor

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

EPOCHS = 300


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    cluster.connect()
    shape = GroupShape(workers=2, cpus_per_worker=0.5, gpus_per_worker=0.0)
    with WorkerPool(1, shape, tmp_path_factory.mktemp("ray")) as pool:
        yield pool
    cluster.disconnect()
    assert not cluster.is_in_use()


@pytest.fixture(scope="module")
def make_job(data_file, tmp_path_factory):
    def make(name, epochs=EPOCHS, hidden=16, **options):
        config = TrialConfig.model_validate(
            {
                "data": DataConfig(path=str(data_file)),
                "model": {"backbone": {"kind": "mlp", "hidden": [hidden], "dropout": 0.3}},
                "loss": {"kind": "cross_entropy"},
                "optimizer": {"kind": "adamw", "lr": 1e-2},
                "train": {"epochs": epochs, "batch_size": 50},
            }
        )
        return Job(name, config, str(options.pop("folder", tmp_path_factory.mktemp(name))), **options)

    return make


class Followed:
    """A job that is followed to its end beside the test."""

    def __init__(self, pool, job):
        self.events = []
        self._pool, self._job = pool, job
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()

    def _follow(self):
        follower = Follower(self._pool.broker, self._job)
        while not self.events or isinstance(self.events[-1], Reported):
            self.events.append(follower.next())
        follower.stop()

    @property
    def epochs(self):
        return [event.result.epoch for event in self.events if isinstance(event, Reported)]

    @property
    def incidents(self):
        return [incident for event in self.events for incident in event.incidents]

    @property
    def notes(self):
        return [note for event in self.events if isinstance(event, Reported) for note in event.result.notes]

    def reaches(self, epoch):
        wait_for(lambda: self.epochs and self.epochs[-1] >= epoch)

    def end(self):
        self._thread.join(timeout=180)
        assert isinstance(self.events[-1], Finished | Failed), self.events[-1:]
        return self.events[-1]

    def metrics(self):
        assert isinstance(self.end(), Finished), self.end()
        assert self.epochs == list(range(1, self._job.config.train.epochs + 1))
        return self.end().outcome.metrics


def wait_for(condition, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while not (met := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return met


def processes_called(name):
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if " ".join(process.cmdline()).startswith(f"ray::{name}"):
                found.append(process)
    return found


def workers():
    return processes_called("RayTrainWorker")


def places():
    """The placement groups that hold resources, by id."""
    return {id for id, group in placement_group_table().items() if group["state"] != "REMOVED"}


def generations(pool):
    return ray.get(pool.broker.generation_count.remote())


@pytest.fixture(scope="module")
def undisturbed(pool, make_job):
    return Followed(pool, make_job("undisturbed")).metrics()


@pytest.mark.parametrize(
    ("number", "fault", "reason"),
    [
        (signal.SIGKILL, "crashed", r"worker [12] of 2 was killed \(SIGKILL, or an exit without a word\)"),
        (signal.SIGSEGV, "crashed", r"worker [12] of 2 crashed: Segmentation fault in \w+\.py:\d+"),
        (signal.SIGABRT, "crashed", r"worker [12] of 2 crashed: Aborted in \w+\.py:\d+"),
        (signal.SIGSTOP, "hang", r"no batch for \d+ s at epoch \d+ \(worker [12] of 2\)"),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else "",
)
def test_a_worker_that_crashes_or_hangs_costs_an_attempt_and_no_number(
    pool, make_job, undisturbed, number, fault, reason
):
    before = generations(pool)
    patience = {"hang_timeout": 20.0} if fault == "hang" else {}
    followed = Followed(pool, make_job(number.name, **patience))
    followed.reaches(20)
    os.kill(workers()[-1].pid, number)
    assert followed.metrics() == undisturbed
    (incident,) = followed.incidents
    assert incident.fault == fault
    assert re.fullmatch(reason, incident.reason), incident.reason
    assert 20 <= incident.epoch < EPOCHS
    assert generations(pool) == before + 1
    assert len(workers()) == 2


def test_without_a_retry_left_the_job_fails_with_the_last_reason(pool, make_job):
    followed = Followed(pool, make_job("no-retry", max_retries=0))
    followed.reaches(5)
    os.kill(workers()[0].pid, signal.SIGKILL)
    ending = followed.end()
    assert isinstance(ending, Failed)
    assert ending.fault == "crashed"
    assert ending.reason.endswith("was killed (SIGKILL, or an exit without a word)")


@pytest.mark.long
def test_without_memory_it_is_tried_again_in_fresh_processes(pool, make_job):
    Followed(pool, make_job("warm", epochs=1)).metrics()
    before = generations(pool)
    for process in workers():
        room = process.memory_info().vms + 40 * 2**20
        resource.prlimit(process.pid, resource.RLIMIT_AS, (room, room))
    followed = Followed(pool, make_job("large", epochs=2, hidden=400_000))
    followed.metrics()
    (incident,) = followed.incidents
    assert incident.fault == "out_of_memory"
    assert re.fullmatch(r"out of memory on \S+ \(\w+\.py:\d+\)", incident.reason), incident.reason
    assert incident.epoch == 0
    assert generations(pool) == before + 1


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_off(file):
    file.write_bytes(file.read_bytes()[:-7])


def number(file):
    """Which one of the trial's checkpoints it is."""
    return int.from_bytes(file.read_bytes().split(b"\n", 1)[1][:8], "big")


@pytest.mark.long
def test_a_damaged_checkpoint_is_replaced_by_the_one_before_or_by_a_new_start(pool, make_job):
    epochs = 500
    plain = Followed(pool, make_job("plain", epochs=epochs)).metrics()
    job = make_job("damaged", epochs=epochs)
    followed = Followed(pool, job)
    both = [Path(job.folder) / name for name in ("checkpoint", "checkpoint.other")]
    notes = []
    for most, damage in ((1, flip_a_bit), (2, cut_off)):
        seen = generations(pool)
        told = len(followed.epochs)
        wait_for(lambda told=told: len(followed.epochs) > told)
        wait_for(lambda: all(file.exists() for file in both))
        frozen = workers()
        for process in frozen:
            os.kill(process.pid, signal.SIGSTOP)
        newest_first = sorted(both, key=number, reverse=True)
        for file in newest_first[:most]:
            damage(file)
        then = "the one before it is used" if most == 1 else "and there is no other: training starts anew"
        notes.append(f"the checkpoint {newest_first[most - 1]} is damaged{':,'[most - 1]} {then}")
        for process in frozen:
            os.kill(process.pid, signal.SIGKILL)
        wait_for(lambda seen=seen: generations(pool) == seen + 1)
    assert followed.metrics() == plain
    assert followed.notes == notes
    assert [incident.fault for incident in followed.incidents] == ["crashed", "crashed"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system that is full but for a few bytes."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(tmp_path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_on_a_full_disk_training_goes_on_without_checkpoints(pool, make_job, small_disk):
    epochs = 250
    plain = Followed(pool, make_job("roomy", epochs=epochs)).metrics()
    before = generations(pool)
    followed = Followed(pool, make_job("full", epochs=epochs, folder=small_disk))
    assert followed.metrics() == plain
    (note,) = followed.notes
    assert re.fullmatch(r"checkpoint of epoch \d+ could not be saved: No space left on device", note)
    assert list(small_disk.iterdir()) == []
    assert (followed.incidents, generations(pool)) == ([], before)


@pytest.mark.long
def test_a_model_that_cannot_be_written_is_said_in_plain_words(pool, make_job, small_disk):
    Followed(pool, make_job("before", epochs=1)).metrics()
    before = generations(pool)
    ending = Followed(pool, make_job("winner", epochs=1, folder=small_disk, export=True)).end()
    assert ending == Failed(f"the model could not be saved in {small_disk}: No space left on device", "error")
    assert generations(pool) == before


class Heard(tune.Callback):
    """What Tune is told, and by whom; kills the trial actor that has told an epoch."""

    def __init__(self, kill_after=None):
        self.results = []
        self.kill_after = kill_after

    def on_trial_result(self, iteration, trials, trial, result, **info):
        self.results.append((result["training_iteration"], result.get("val/loss"), result["pid"]))
        if result["training_iteration"] == self.kill_after:
            self.kill_after = None
            os.kill(result["pid"], signal.SIGKILL)


class StopsAtOnce(FIFOScheduler):
    def on_trial_result(self, tune_controller, trial, result):
        return TrialScheduler.STOP


def run_tune(pool, jobs, tmp_path, scheduler=None, kill_after=None):
    heard = Heard(kill_after)
    results = tune.Tuner(
        tune.with_resources(TrialActor, tune.PlacementGroupFactory([{"memory": 1}])),
        param_space={"broker": pool.broker_name, "job": tune.grid_search(jobs), "metric": "val/loss"},
        tune_config=tune.TuneConfig(
            metric="val/loss",
            mode="min",
            scheduler=scheduler,
            max_concurrent_trials=1,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(tmp_path),
            verbose=0,
            callbacks=[heard],
            failure_config=tune.FailureConfig(max_failures=2),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    ).fit()
    return results, heard.results


def test_a_trial_actor_that_is_killed_is_replaced_and_no_epoch_is_lost(pool, make_job, undisturbed, tmp_path):
    before = generations(pool)
    job = make_job("followed")
    results, heard = run_tune(pool, [job], tmp_path, kill_after=20)
    assert results.num_errors == 0
    epochs = [epoch for epoch, *_ in heard]
    assert sorted(set(epochs)) == list(range(1, EPOCHS + 1))
    assert len(epochs) <= EPOCHS + 1, "at most one is told twice"
    assert epochs == sorted(epochs)
    assert len({pid for *_, pid in heard}) == 2
    assert heard[-1][1] == undisturbed["val/loss"]
    assert generations(pool) == before, "the job was trained on meanwhile"


class KillsWhoIsIdle(tune.Callback):
    def on_trial_complete(self, iteration, trials, trial, **info):
        actor = psutil.Process(trial.last_result["pid"])
        actor.kill()
        wait_for(lambda: not actor.is_running() or actor.status() == psutil.STATUS_ZOMBIE)


def test_a_trial_that_was_given_to_a_dead_actor_is_trained_by_another(pool, make_job, tmp_path):
    ledger = Ledger.open(Place(tmp_path / "ledger.log"), "search", "min", resume=False)
    searcher = LedgerSearcher(
        ledger,
        lambda trial: trial.suggest_float("x", 0.0, 1.0),
        lambda number, config: make_job(f"{tmp_path.name}-{number}", epochs=2),
        pool.broker_name,
        "val/loss",
        "min",
        Listeners([]),
        halted=lambda: False,
        enough=lambda: False,
        trials=3,
        groups=lambda: 1,
    )
    tune.Tuner(
        tune.with_resources(TrialActor, tune.PlacementGroupFactory([{"memory": 1}])),
        tune_config=tune.TuneConfig(
            metric="val/loss",
            mode="min",
            search_alg=searcher,
            num_samples=-1,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(tmp_path),
            verbose=0,
            callbacks=[KillsWhoIsIdle()],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    ).fit()
    ended = [(record.number, record.state, record.epochs) for record in ledger.records()]
    assert ended == [(0, "completed", 2), (1, "completed", 2), (2, "completed", 2)]


def test_a_broker_that_is_killed_comes_back_and_the_job_goes_on(pool, make_job, undisturbed):
    followed = Followed(pool, make_job("orphan"))
    followed.reaches(20)
    (broker,) = processes_called("Broker")
    os.kill(broker.pid, signal.SIGKILL)
    assert followed.metrics() == undisturbed
    assert [process.pid for process in processes_called("Broker")] != [broker.pid]


def test_a_controller_that_is_killed_gives_back_its_place(pool, make_job, undisturbed):
    """Ray itself would keep both places until the search is over: then there is no room for a third."""
    followed = Followed(pool, make_job("uncontrolled"))
    followed.reaches(20)
    (training,) = processes_called("TrainController")
    (place,) = places()
    os.kill(training.pid, signal.SIGKILL)
    (starting,) = wait_for(lambda: [each for each in processes_called("TrainController") if each != training])
    wait_for(lambda: places() - {place})
    os.kill(starting.pid, signal.SIGKILL)
    assert followed.metrics() == undisturbed
    wait_for(lambda: len(places()) == 1)


def test_after_a_hundred_stopped_trials_nothing_is_left(pool, make_job, tmp_path):
    Followed(pool, make_job("first", epochs=1)).metrics()
    before = generations(pool)
    jobs = [make_job(f"stopped-{number}", epochs=3) for number in range(100)]
    results, heard = run_tune(pool, jobs, tmp_path, StopsAtOnce())
    assert results.num_errors == 0
    assert [epoch for epoch, *_ in heard] == [1] * 100
    assert generations(pool) == before
    wait_for(lambda: not any(psutil.pid_exists(pid) for *_, pid in heard))
    assert len(workers()) == 2
    wait_for(lambda: len(places()) == 1)  # that of the worker group
    wait_for(lambda: ray.get(pool.broker.jobs.remote()) == [])
