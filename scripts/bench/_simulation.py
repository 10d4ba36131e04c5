"""A whole search on worker groups that only pretend to train, in virtual time.

Real: `run_search` with all that it starts (Tune's Tuner, TuneController and scheduler, LedgerSearcher,
the ledger with Optuna's sampler and journal file, listeners, curves, tracking spool), TrialActor, Broker.

Stood in for, each by the class of that name here:

- Ray's cluster: none is started;
- the worker groups, by `Groups`: a coroutine per worker that follows `search/worker.py` (take, report, obey,
  finish) and sleeps where an epoch would be trained;
- Ray's actor processes, by `Actors` in place of Tune's RayActorManager: trial actors are objects in this
  process. What the driver pickles for them and unpickles from them it still does;
- time, by `VirtualLoop`: when nothing is left to do, the clock goes on to the next event. The driver takes no
  virtual time, or with `charge` as much as it really takes (not what actors and groups take);
- delivery to MLflow (the spool is written, nobody reads it), and all that comes after the trials.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import math
import os
import random
import selectors
import subprocess
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import ray
import ray.tune.tune
from ray import cloudpickle
from ray.air.execution._internal.tracked_actor import TrackedActor
from ray.train._internal import storage
from ray.tune.execution import tune_controller
from rich.console import Console

from hiertune import Taxonomy
from hiertune.config import TrialConfig
from hiertune.data import write_dataset
from hiertune.search import cluster, driver, trainable
from hiertune.search.broker import Broker
from hiertune.search.messages import Cause, Job
from hiertune.search.plan import SearchPlan, plan_search
from hiertune.tracking import tracker
from hiertune.train.result import Decision, EpochResult, TrialOutcome

ELSEWHERE = "elsewhere"
"""What happens in other processes: actors, broker, worker groups."""
OTHER = "other"

LEVELS = ("domain", "phylum", "class", "order", "family", "genus")

SPACE = """
name: scale
data: {path: data.h5}
model:
  backbone:
    kind: mlp
    hidden: [16]
    dropout: {uniform: [0.0, 0.5]}
    feature_length: {loguniform: [10, 24]}
  head:
    choice:
      - {kind: linear}
      - {kind: hierarchical_softmax}
      - {kind: conditional, routing: {choice: [soft, hard, gumbel]}, temperature: {loguniform: [0.2, 5.0]}}
loss: {kind: taxonomy_smoothing, alpha: {uniform: [0.05, 0.35]}, beta: {loguniform: [0.2, 2.0]}}
weighting:
  choice:
    - {kind: equal}
    - {kind: gradnorm, alpha: {uniform: [0.0, 3.0]}}
optimizer: {kind: adamw, lr: {loguniform: [1.0e-4, 1.0e-1]}}
train: {epochs: EPOCHS, batch_size: 50}
search:
  objective: {metric: val/accuracy/genus}
  trials: TRIALS
  sampler: SAMPLER
  scheduler: SCHEDULER
  refit: false
  controls: false
  decode: false
"""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is simulated."""

    trials: int
    groups: int
    epochs: int = 16
    sampler: str = "{kind: random}"
    scheduler: str = "{kind: asha, grace_epochs: 1, reduction_factor: 4}"
    ranks: int = 1
    """Workers of a group; each is a client of the broker, the driver sees one trial."""
    epoch_seconds: float = 30.0
    """Median length of an epoch, in virtual seconds; trials differ by a factor of 1.5 (log-normal), and
    epochs of one trial by 5%."""
    values: int = 44
    """Metrics per epoch: as many as a search over six levels reports."""
    failing: float = 0.0
    """Share of trials whose loss stops being finite, in one of the first four epochs."""
    charge: bool = False
    """The driver's real time passes in virtual time too, so that groups wait for it."""
    resume: bool = False
    terminal: bool = False
    """Draw the live display, as in a terminal."""


class TrialsDone(BaseException):
    """The search has come to its winner, which isn't simulated."""


class Stuck(RuntimeError):
    """Everything waits for something that can't happen."""


# ---------------------------------------------------------------------------------------------- time


class _Clock(selectors.SelectSelector):
    """What an event loop waits with: moves the time on instead."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list:
        if timeout is None:
            raise Stuck
        self.now += max(timeout, 0.0)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in which sleeping takes no time."""

    def __init__(self) -> None:
        self._clock = _Clock()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now

    def pass_time(self, seconds: float) -> None:
        self._clock.now += seconds

    def end(self) -> None:
        """Close it, with what the broker still has running."""
        if tasks := asyncio.all_tasks(self):
            for task in tasks:
                task.cancel()
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.close()


class Meter:
    """Whose seconds of this thread are spent: those of the innermost `part` only."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inside = [OTHER]
        self._since = time.thread_time()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._turn()
        self._inside.append(name)
        try:
            yield
        finally:
            self._turn()
            self._inside.pop()

    def own(self) -> float:
        """The driver's seconds so far: of all parts but ELSEWHERE."""
        self._turn()
        return sum(self.seconds.values()) - self.seconds[ELSEWHERE]

    def _turn(self) -> None:
        now = time.thread_time()
        self.seconds[self._inside[-1]] += now - self._since
        self._since = now


# ------------------------------------------------------------------------------------- worker groups


class Groups:
    """The worker groups, all of them, and what they would have measured."""

    def __init__(self, setting: Setting, broker: Broker, loop: VirtualLoop) -> None:
        self._setting = setting
        self._broker = broker
        self._loop = loop
        self._names = metric_names(setting.values)
        self._trained: dict[str, int] = {}
        """Epochs behind each trial, by its folder: its checkpoint."""
        self.reports = 0
        self.busy = self.waited = 0.0
        """Virtual seconds that rank 0 of all groups trained, and waited for an answer to a report."""
        self.longest = 0.0
        """Virtual seconds that the longest trial was trained."""

    def start(self) -> None:
        self._tasks = [
            self._loop.create_task(self._work(f"group-{index}", rank))
            for index in range(self._setting.groups)
            for rank in range(self._setting.ranks)
        ]

    def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*self._tasks, return_exceptions=True))

    async def _work(self, group: str, rank: int) -> None:
        token = f"token of {group}"
        await self._broker.open_generation(group, token)
        number = 0
        while (job := await self._broker.take(group, token, rank, number)) is not None:
            await self._train(job, group, token, rank, number)
            number += 1

    async def _train(self, job: Job, group: str, token: str, rank: int, number: int) -> None:
        epochs = job.config.train.epochs
        trial = Path(job.folder).name
        pace, fails = _luck(trial, self._setting)
        metrics: dict[str, float] = {}
        begun = self._loop.time()
        for epoch in range(self._trained.get(trial, 0) + 1, epochs + 1):
            noise = random.Random(f"{trial}/{epoch}")
            seconds = self._setting.epoch_seconds * pace * noise.lognormvariate(0.0, 0.05)
            await asyncio.sleep(seconds)
            if epoch == fails:
                if rank == 0:
                    reason = f"the loss was not finite in epoch {epoch}"
                    await self._broker.fail(group, token, number, Cause("diverged", reason))
                return
            metrics = dict.fromkeys(self._names, accuracy(job.config, epoch) + noise.gauss(0.0, 0.01))
            result = EpochResult(epoch, metrics, seconds, 100 * epoch, last=epoch == epochs)
            reported = self._loop.time()
            decision = await self._broker.report(group, token, rank, number, result)
            if rank == 0:
                self._trained[trial] = epoch
                self.reports += 1
                self.busy += seconds
                self.waited += self._loop.time() - reported
                self.longest = max(self.longest, self._loop.time() - begun)
            if decision is Decision.STOP:
                break
        if rank == 0:
            done = self._trained[trial]
            await self._broker.finish(group, token, number, TrialOutcome(done, done < epochs, metrics))


def metric_names(count: int) -> list[str]:
    """`count` names as a search over six levels has them, the objective first."""
    kinds = ("val/accuracy", "val/loss", "train/loss", "val/accuracy_seen", "val/top5_accuracy", "weight")
    names = [f"{kind}/{level}" for kind in kinds for level in reversed(LEVELS)]
    names += [f"val/extra/{index}" for index in range(count - len(names))]
    return names[:count]


def accuracy(config: TrialConfig, epoch: int) -> float:
    """A learning curve that depends on the config, so that samplers and schedulers have work to do."""
    best = 0.9 - 0.1 * abs(math.log10(config.optimizer.lr / 3e-3))
    best -= 0.2 * abs(config.model.backbone.dropout - 0.2)  # type: ignore[union-attr]
    best += 0.02 * (config.model.head.kind != "linear")
    return best * (1 - math.exp(-epoch / 4))


def _luck(trial: str, setting: Setting) -> tuple[float, int | None]:
    """How slow a trial's epochs are, and the epoch in which it fails."""
    draw = random.Random(trial)
    pace = draw.lognormvariate(0.0, math.log(1.5))
    return pace, draw.randint(1, 4) if draw.random() < setting.failing else None


class Pool:
    """In place of WorkerPool."""

    def __init__(self, simulation: Simulation, most: int, *_: Any, **__: Any) -> None:
        self.size = min(most, simulation.setting.groups)
        self.broker_name = "broker"
        self._simulation = simulation

    def __enter__(self) -> Pool:
        self._simulation.groups.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._simulation.groups.end()

    def run(self, job: Job) -> None:
        raise TrialsDone

    def check(self) -> None: ...

    def halt(self) -> None:
        raise AssertionError("nobody stops a simulated search")


# ------------------------------------------------------------------------------------ trial actors


class _Blocked(BaseException):
    """A trial actor waits for an answer: its method is called once more when that is there."""

    def __init__(self, answer: asyncio.Task) -> None:
        self.answer = answer


class _Handle:
    """The broker as TrialActor sees it: `handle.method.remote(...)`."""

    def __init__(self, broker: Broker, loop: VirtualLoop) -> None:
        self._broker = broker
        self._loop = loop
        self.answers: dict[tuple, asyncio.Task] = {}
        """What blocked actors wait for: the same call, made once more, finds it here."""

    def __getattr__(self, name: str) -> _Method:
        return _Method(self, name)

    def get(self, reference: tuple[tuple | None, asyncio.Task], **_: Any) -> Any:
        """In place of `ray.get`."""
        key, answer = reference
        if key is None:
            return self._loop.run_until_complete(answer)
        if not answer.done():
            self.answers[key] = answer
            raise _Blocked(answer)
        return answer.result()


@dataclasses.dataclass
class _Method:
    handle: _Handle
    name: str

    def remote(self, *args: Any) -> tuple[tuple | None, asyncio.Task]:
        key = (self.name, *args) if self.name == "advance" else None
        if key is not None and (answer := self.handle.answers.pop(key, None)) is not None:
            return key, answer
        call = getattr(self.handle._broker, self.name)
        return key, self.handle._loop.create_task(call(*args))


class _Process:
    """A trial actor as Tune sees it."""

    def __init__(self, actor: trainable.TrialActor) -> None:
        self.actor = actor

    @property
    def get_auto_filled_metrics(self) -> _Process:
        return self

    def remote(self, **options: Any) -> dict:
        return self.actor.get_auto_filled_metrics(**options)


@dataclasses.dataclass(eq=False)
class _Call:
    """A task of an actor; `on_result` is called by the driver with what came out."""

    actor: TrackedActor
    on_result: Callable[..., None] | None
    result: bytes = b""
    dropped: bool = False


class Actors:
    """In place of Tune's RayActorManager: the part of it that TuneController uses."""

    def __init__(self, simulation: Simulation, resource_manager: Any) -> None:
        self._simulation = simulation
        self._loop = simulation.loop
        self._live_actors_to_ray_actors_resources: dict[TrackedActor, tuple[_Process, None]] = {}
        self._waiting: dict[TrackedActor, dict[str, Any]] = {}
        self._calls: dict[TrackedActor, set[_Call]] = {}
        self._ready: deque[_Call] = deque()
        self._wanted: asyncio.Future | None = None
        self._meter = simulation.meter
        self._paid = 0.0
        """Of the driver's own seconds, those that have passed in virtual time too."""

    num_live_actors = property(lambda self: len(self._live_actors_to_ray_actors_resources))
    num_pending_actors = property(lambda self: len(self._waiting))
    num_total_actors = property(lambda self: self.num_live_actors + self.num_pending_actors)
    num_actor_tasks = property(lambda self: sum(map(len, self._calls.values())))

    def next(self, timeout: float | None = None) -> bool:
        """Wait for an actor's answer and give it to the driver."""
        if self._simulation.setting.charge:
            self._loop.pass_time(self._meter.own() - self._paid)
        with self._meter.part(ELSEWHERE):
            self._start()
            while not self._ready:
                if not any(self._calls.values()):
                    return False
                self._wanted = self._loop.create_future()
                self._loop.run_until_complete(self._wanted)
            call = self._ready.popleft()
        self._paid = self._meter.own()
        if not call.dropped:
            self._calls[call.actor].discard(call)
            with self._meter.part("transport"):
                result = cloudpickle.loads(call.result)
            if call.on_result is not None:
                call.on_result(call.actor, *result)
        return True

    def add_actor(
        self, cls: Any, resource_request: Any, kwargs: dict, on_start: Any, on_stop: Any, on_error: Any
    ) -> TrackedActor:
        actor = TrackedActor(id(kwargs), on_start=on_start, on_stop=on_stop, on_error=on_error)
        self._waiting[actor] = kwargs
        return actor

    def remove_actor(
        self, tracked_actor: TrackedActor, kill: bool = False, stop_future: _Call | None = None
    ) -> bool:
        if tracked_actor in self._waiting:
            del self._waiting[tracked_actor]
            return False
        assert stop_future is not None, "nothing is killed here"
        stop_future.on_result = self._stopped
        return True

    def schedule_actor_task(
        self,
        tracked_actor: TrackedActor,
        method_name: str,
        args: tuple = (),
        kwargs: dict | None = None,
        on_result: Callable[..., None] | None = None,
        on_error: Callable[..., None] | None = None,
        _return_future: bool = False,
    ) -> _Call:
        call = _Call(tracked_actor, on_result)
        self._calls[tracked_actor].add(call)
        with self._meter.part("transport"):
            request = cloudpickle.dumps((args, kwargs or {}))
        process, _ = self._live_actors_to_ray_actors_resources[tracked_actor]
        with self._meter.part(ELSEWHERE):
            args, kwargs = cloudpickle.loads(request)
            self._attempt(call, functools.partial(getattr(process.actor, method_name), *args, **kwargs))
        return call

    def clear_actor_task_futures(self, tracked_actor: TrackedActor) -> None:
        for call in self._calls[tracked_actor]:
            call.dropped = True
        self._calls[tracked_actor].clear()

    def is_actor_started(self, tracked_actor: TrackedActor) -> bool:
        return tracked_actor in self._live_actors_to_ray_actors_resources

    def is_actor_failed(self, tracked_actor: TrackedActor) -> bool:
        return False

    def get_live_actors_resources(self) -> dict:
        return {}

    def cleanup(self) -> None: ...

    def _start(self) -> None:
        """Actors start at once: nothing here waits for resources or for processes."""
        for actor, kwargs in list(self._waiting.items()):
            del self._waiting[actor]
            alive = trainable.TrialActor(**cloudpickle.loads(cloudpickle.dumps(kwargs)))
            self._live_actors_to_ray_actors_resources[actor] = _Process(alive), None
            call = _Call(actor, actor._on_start, cloudpickle.dumps(()))
            self._calls[actor] = {call}
            self._ready.append(call)

    def _attempt(self, call: _Call, method: Callable[[], Any]) -> None:
        try:
            result = method()
        except _Blocked as blocked:
            blocked.answer.add_done_callback(lambda _: self._attempt(call, method))
            return
        call.result = cloudpickle.dumps((result,))
        self._ready.append(call)
        if self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(None)

    def _stopped(self, actor: TrackedActor, *_: Any) -> None:
        del self._live_actors_to_ray_actors_resources[actor]
        del self._calls[actor]
        if actor._on_stop:
            actor._on_stop(actor)


# --------------------------------------------------------------------------------------- a search


class Simulation:
    """One search. `run` may be called inside other patches, such as those of a meter."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        self.setting = setting
        self.loop = VirtualLoop()
        self.broker = Broker()
        self.groups = Groups(setting, self.broker, self.loop)
        self.plan = make_plan(setting, folder)
        self.meter = Meter()

    def run(self) -> None:
        handle = _Handle(self.broker, self.loop)
        resources = {"CPU": float(self.setting.groups)}
        with contextlib.ExitStack() as stack, contextlib.suppress(TrialsDone):
            for owner, name, replacement in (
                (driver, "WorkerPool", functools.partial(Pool, self)),
                (cluster, "connect", lambda *_: None),
                (cluster, "this_node", lambda: {"CPU": 0.001}),
                (driver.Lifeline, "watch_start", lambda _: None),
                (driver.Lifeline, "watch", lambda _: None),
                (cluster, "node_resources", lambda: [resources]),
                (ray, "cluster_resources", lambda: resources),
                (sys.modules["ray.tune.tune"], "_ray_auto_init", lambda *_, **__: None),
                (ray, "get", handle.get),
                (ray, "get_actor", lambda *_, **__: handle),
                (tune_controller, "RayActorManager", functools.partial(Actors, self)),
                (storage, "_get_ray_train_session_dir", lambda: str(self.plan.folder.ray / "session")),
                (tracker, "launch_delivery", _no_delivery),
            ):
                stack.enter_context(mock.patch.object(owner, name, replacement))
            environment = {**cluster.ENVIRONMENT, "RAY_CHDIR_TO_TRIAL_DIR": "0"}
            stack.enter_context(mock.patch.dict(os.environ, environment))
            output = stack.enter_context(open(os.devnull, "w"))
            stack.callback(self.loop.end)
            console = Console(file=output, force_terminal=self.setting.terminal, width=120, height=40)
            driver.run_search(self.plan, console)


def make_plan(setting: Setting, folder: Path) -> SearchPlan:
    """The plan of a search over six levels, in `folder`."""
    data, space = folder / "data.h5", folder / "space.yaml"
    if not data.exists():
        lineages = [tuple(f"{level}{index % 4}" for level in LEVELS) for index in range(80)]
        taxonomy = Taxonomy.from_lineages(lineages, list(LEVELS))
        inputs = np.zeros((80, 4), np.float32)
        write_dataset(data, inputs, taxonomy.encode(lineages), taxonomy, [f"row{i}" for i in range(80)])
    text = SPACE
    for name in ("epochs", "trials", "sampler", "scheduler"):
        text = text.replace(name.upper(), str(getattr(setting, name)))
    space.write_text(text)
    return plan_search(space, folder / "runs", resume=setting.resume)


def _no_delivery(*_: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", ""])
