"""Real Ray, real TorchTrainer groups of two gloo workers: warmth and faults change no number."""

import os
import signal
import threading
import time

import psutil
import pytest
import ray
from ray.util import placement_group_table

from hiertune.config import DataConfig, TrialConfig
from hiertune.search.capacity import GroupShape
from hiertune.search.follower import Follower
from hiertune.search.messages import Failed, Finished, Job, Stopped
from hiertune.search.pool import WorkerPool

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SHAPE = GroupShape(workers=2, cpus_per_worker=1.0, gpus_per_worker=0.0)


@pytest.fixture
def pool(ray_session, tmp_path):
    with WorkerPool(1, SHAPE, tmp_path / "ray") as pool:
        yield pool


@pytest.fixture
def make_job(data_file, tmp_path):
    def make(name, epochs=3, lr=1e-2, seed=0, **options):
        config = TrialConfig.model_validate(
            {
                "data": DataConfig(path=str(data_file)),
                "model": {
                    "backbone": {"kind": "mlp", "hidden": [16], "dropout": 0.3},
                    "head": {"kind": "conditional", "routing": "gumbel"},
                },
                "loss": {"kind": "taxonomy_smoothing"},
                "weighting": {"kind": "gradnorm", "interval": 2},
                "optimizer": {"kind": "adamw", "lr": lr},
                "train": {"epochs": epochs, "batch_size": 50, "seed": seed},
            }
        )
        return Job(name, config, str(options.pop("folder", tmp_path / name)), test_on=("test",), **options)

    return make


def metrics(ending):
    assert isinstance(ending, Finished), ending
    return ending.outcome.metrics


def workers_of(pool):
    """The processes that train, by what Ray calls them."""
    own = psutil.Process().children(recursive=True)
    return [process for process in own if _name(process).startswith("ray::RayTrainWorker")]


def _name(process):
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def generations(pool):
    return ray.get(pool.broker.generation_count.remote())


def test_numbers_are_the_same_in_a_fresh_group_a_warm_one_and_after_failures(pool, make_job, tmp_path):
    fresh = metrics(pool.run(make_job("fresh")))
    for number in range(8):
        metrics(pool.run(make_job(f"other-{number}", epochs=1, seed=number)))
    tenth = metrics(pool.run(make_job("tenth")))
    assert generations(pool) == 1
    assert tenth == fresh

    diverged = pool.run(make_job("diverged", lr=1e30))
    assert isinstance(diverged, Failed)
    assert diverged.reason.startswith("train/loss is not finite at epoch 1")
    assert metrics(pool.run(make_job("after-divergence"))) == fresh
    assert generations(pool) == 1, "a loss that is not finite leaves the group sound"

    # The name of the logits' file is none, which ends the trial by an exception on one rank only.
    raised = pool.run(make_job("raises", keep_logits=str(tmp_path / "a\0b")))
    assert isinstance(raised, Failed)
    assert raised.fault == "error"
    assert raised.reason.startswith("ValueError: ")
    assert "no name of a file" in raised.reason
    assert metrics(pool.run(make_job("after-exception"))) == fresh
    assert generations(pool) == 2, "after an exception the group is not trusted"


def test_a_killed_worker_costs_no_trial_and_no_number(pool, make_job):
    undisturbed = metrics(pool.run(make_job("undisturbed", epochs=200)))
    ending = []
    runner = threading.Thread(target=lambda: ending.append(pool.run(make_job("killed", epochs=200))))
    runner.start()
    deadline = time.monotonic() + 60
    while ray.get(pool.broker.progress.remote("killed")) < 20 and time.monotonic() < deadline:
        time.sleep(0.02)
    victim = workers_of(pool)[-1]
    os.kill(victim.pid, signal.SIGKILL)
    runner.join(timeout=120)
    assert metrics(ending[0]) == undisturbed
    assert generations(pool) == 2


def test_nothing_is_left_when_a_pool_closes(ray_session, make_job, tmp_path):
    with WorkerPool(1, SHAPE, tmp_path / "ray") as pool:
        metrics(pool.run(make_job("only", epochs=1)))
        assert len(workers_of(pool)) == 2
    deadline = time.monotonic() + 30
    while workers_of(pool) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers_of(pool) == []
    assert {group["state"] for group in placement_group_table().values()} <= {"REMOVED"}


def test_a_broker_that_is_killed_while_a_search_stops_does_not_forget_it(ray_session, make_job, tmp_path):
    def kill_broker():
        (broker,) = [each for each in psutil.Process().children(recursive=True) if "Broker" in _name(each)]
        os.kill(broker.pid, signal.SIGKILL)

    with WorkerPool(1, SHAPE, tmp_path / "ray") as pool:
        metrics(pool.run(make_job("first", epochs=1)))
        pool.halt()
        kill_broker()
        late = Follower(pool.broker, make_job("late"))
        assert late.next() == Stopped()
        late.stop()
        pool.settle()
        metrics(pool.run(make_job("last", epochs=1)))
        kill_broker()  # its group begins anew, and comes to the third one
        ray.get(pool.broker.close.remote())
        kill_broker()
    assert not any(thread.is_alive() for thread in pool._threads.values()), "they went home by themselves"


def test_a_group_can_be_replaced_after_every_trial(ray_session, make_job, tmp_path):
    with WorkerPool(1, SHAPE, tmp_path / "ray", recycle_after=1) as pool:
        first, second = (metrics(pool.run(make_job(name))) for name in ("first", "second"))
        assert generations(pool) == 2
    assert first == second
