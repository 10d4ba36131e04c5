"""Trial actors at a real broker, all in this process."""

import asyncio
from types import SimpleNamespace

import pytest
import ray

from hiertune.config import DataConfig, TrialConfig
from hiertune.search.broker import Broker
from hiertune.search.messages import Job
from hiertune.search.trainable import TrialActor
from hiertune.train.result import EpochResult, TrialOutcome

JOB = Job("t", TrialConfig(data=DataConfig(path="none.h5")), "/nowhere")


class Line:
    """The broker as its handle shows it; `ray.get` runs what was asked."""

    def __init__(self, broker):
        self._broker = broker

    def __getattr__(self, name):
        return SimpleNamespace(remote=getattr(self._broker, name))


@pytest.fixture
def loop(monkeypatch):
    loop = asyncio.new_event_loop()
    monkeypatch.setattr(ray, "get", lambda answer: loop.run_until_complete(asyncio.wait_for(answer, 5)))
    yield loop
    for task in (left := asyncio.all_tasks(loop)):
        task.cancel()
    loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
    loop.close()


@pytest.fixture
def broker(loop, monkeypatch):
    broker = Broker()
    monkeypatch.setattr(ray, "get_actor", lambda name: Line(broker))
    ray.get(broker.open_generation("g", "a"))
    return broker


def config(job):
    return {"broker": "broker", "job": job, "metric": "val/loss"}


def told(result):
    return {key: result[key] for key in ("state", "done", "val/loss") if key in result}


def epoch(number, last=False):
    return EpochResult(number, {"val/loss": 1.0 / number}, 0.1, number, last)


def test_an_actor_whose_trial_goes_to_an_idle_one_before_it_begins_stops_nothing(loop, broker):
    """Tune starts an actor for a trial, and then gives it to one that has become free in the meantime."""
    fresh, idle = TrialActor(config(JOB)), TrialActor(config(JOB.up_to(1)))
    idle.reset_config(config(JOB))
    fresh.cleanup()
    assert ray.get(broker.take("g", "a", 0, 0)) == JOB
    report = loop.create_task(broker.report("g", "a", 0, 0, epoch(1, last=True)))
    assert told(idle.step()) == {"state": "completed", "done": True, "val/loss": 1.0}
    ray.get(report)


def test_an_actor_tells_that_a_part_has_ended_once_its_checkpoint_is_saved(loop, broker):
    part = JOB.up_to(1)
    actor = TrialActor(config(part))
    ray.get(broker.submit(part))
    ray.get(broker.take("g", "a", 0, 0))
    reported = loop.create_task(broker.report("g", "a", 0, 0, epoch(1)))
    assert told(actor.step()) == {"state": "running", "done": False, "val/loss": 1.0}

    async def save():
        await reported
        await broker.finish("g", "a", 0, TrialOutcome(epochs=1, stopped=True, metrics={}))

    loop.create_task(save())
    assert told(actor.step()) == {"state": "paused", "done": True}
    actor.cleanup()
    assert ray.get(broker.jobs()) == []
