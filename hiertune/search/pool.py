"""The worker groups of a search: each one TorchTrainer, kept alive and fed with jobs."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from hiertune.search import cluster
from hiertune.search.broker import Broker
from hiertune.search.capacity import GroupShape
from hiertune.search.follower import Follower
from hiertune.search.lifeline import Lifeline
from hiertune.search.messages import Failed, Finished, Job, Reported, Stopped
from hiertune.search.processes import RayProcesses
from hiertune.search.trainer import GroupTrainer, found_no_room, free_lost_places

logger = logging.getLogger(__name__)

_IDLE_STARTS_ALLOWED = 2
_LOOK_S = 2.0
"""How often the pool looks which nodes there are."""
_GOODBYE_S = 30.0
"""How long idle workers may take to go home; whoever stays is ended with the cluster."""
_GOODBYE_AFTER_ERROR_S = 5.0
_SAVED_S = 600.0
"""How long a checkpoint may take to be written."""


class WorkerPool:
    """Up to `most` worker groups, as many as the cluster holds, and the broker that feeds them.

    Use as a context manager. `size` is how many there shall be at present: it follows the nodes that
    come and go. The groups live in the driver's care, not in Tune's: Tune keeps an idle trial actor
    only when another trial happens to be pending, and a group takes 15 s to start.

    Args:
        most: groups that there is work for.
        shape: what each of them asks for.
        storage: folder of Ray Train's own files.
        recycle_after: jobs after which a group is replaced.
        wait_for_nodes: seconds without room for one group, after which the search is stopped.
        say: tells the user what the pool waits for.
        lifeline: tells a lost Ray from a lost group.
    """

    def __init__(
        self,
        most: int,
        shape: GroupShape,
        storage: Path,
        recycle_after: int | None = None,
        *,
        wait_for_nodes: float = 600.0,
        say: Callable[[str], None] = lambda text: None,
        lifeline: Lifeline | None = None,
    ):
        self.broker_name = f"hiertune-broker-{uuid.uuid4().hex}"
        # A broker that dies starts again and knows its orders only: workers and submitters come to it anew.
        orders = storage / "broker.json"
        orders.unlink(missing_ok=True)
        actor = ray.remote(Broker).options(
            num_cpus=0,
            max_concurrency=10_000,
            name=self.broker_name,
            max_restarts=-1,
            max_task_retries=-1,
            scheduling_strategy=cluster.on_this_node(),
        )
        self.broker: Any = actor.remote(recycle_after, RayProcesses(), orders)
        self._most = most
        self._shape = shape
        self._storage = storage
        self._wait_for_nodes = wait_for_nodes
        self._say = say
        self._lifeline = lifeline
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._threads: dict[str, threading.Thread] = {}
        self._started = 0
        self._room_since = time.monotonic()
        self.size = self._fit()
        self._watcher = cluster.thread(self._watch)

    def __enter__(self) -> WorkerPool:
        if self._lifeline is not None:
            self._lifeline.hold(self.broker)
        self._watcher.start()
        return self

    def __exit__(self, error_type, error, trace) -> None:
        if error_type is not None and issubclass(error_type, KeyboardInterrupt):
            self._closing.set()  # the workers end with Ray
            return
        self.close(_GOODBYE_S if error is None else _GOODBYE_AFTER_ERROR_S)

    def run(self, job: Job) -> Finished | Failed:
        """Train one job outside Tune, to its end."""
        follower = Follower(self.broker, job)
        while True:
            event = follower.next()
            assert not isinstance(event, Stopped), "a pool is halted only while Tune runs"
            for incident in event.incidents:
                logger.warning("%s goes on after epoch %d: %s", job.id, incident.epoch, incident.reason)
            if not isinstance(event, Reported):
                follower.stop()
                return event
            if self._lifeline is not None:
                self._lifeline.progressed()
            for note in event.result.notes:
                logger.info("%s: %s", job.id, note)

    def halt(self) -> None:
        """Jobs that no worker group holds are Stopped; those that one holds go on."""
        self._tell("halt")

    def settle(self) -> None:
        """End what Tune has left running, wait until it is saved, and take jobs again."""
        self._tell("settle")
        self._tell("go_on")

    def _tell(self, message: str) -> None:
        try:
            ray.get(getattr(self.broker, message).remote(), timeout=_SAVED_S)
        except RayError as error:  # what the workers do then is of no importance any more
            logger.warning("the worker groups could not be told to %s: %s", message, error)

    def check(self) -> None:
        """Does not return where Ray is lost, which explains whatever went wrong."""
        if self._lifeline is not None:
            self._lifeline.check()

    def close(self, timeout_s: float) -> None:
        """Send the workers home and wait until their trainers are gone."""
        self._closing.set()
        try:
            ray.get(self.broker.close.remote())
        except RayError as error:  # after an interruption Ray may be half gone; so are the workers then
            logger.warning("the worker groups could not be told to go home: %s", error)
            return
        deadline = time.monotonic() + timeout_s
        with self._lock:
            threads = [self._watcher, *self._threads.values()]
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if self._lifeline is not None:
            self._lifeline.hold(None)
        ray.kill(self.broker)

    # ------------------------------------------------------------------ how many groups there are

    def _fit(self) -> int:
        return min(self._most, self._shape.fit(cluster.node_resources()))

    def _watch(self) -> None:
        """The pool's own thread: as many groups as there is room for, until the pool closes."""
        waiting = False
        while True:
            free_lost_places()
            self.size = self._fit()
            if self.size < self._most:
                cluster.ask_for(self._shape, self._most)  # again: Ray Train's own requests replace it
            if self.size:
                self._room_since = time.monotonic()
                if waiting:
                    self._announce("there are nodes again")
            elif not waiting:
                self._announce(
                    f"waiting for nodes: {self._shape.shortage(cluster.node_resources())} (for up to "
                    f"{self._wait_for_nodes / 60:g} minutes: search.wait_for_nodes)"
                )
            waiting = not self.size
            if time.monotonic() - self._room_since > self._wait_for_nodes:
                self._announce("no nodes came: the search stops")
                self._stop_search()
                break
            with self._lock:
                missing = 0 if self._closing.is_set() else self.size - len(self._threads)
                for _ in range(missing):
                    self._start_group()
            if self._closing.wait(_LOOK_S):
                break
        cluster.ask_for(self._shape, 0)

    def _announce(self, text: str) -> None:
        logger.warning("%s", text)
        self._say(text)

    def _stop_search(self) -> None:
        """As a user would: once to finish the epochs, which can't be, and once more."""
        for _ in range(2):
            if not self._closing.wait(_LOOK_S):
                os.kill(os.getpid(), signal.SIGTERM)

    def _start_group(self) -> None:
        self._started += 1
        group = f"group-{self._started - 1}"
        self._threads[group] = cluster.thread(self._keep_alive, group)
        self._threads[group].start()

    def _keep_alive(self, group: str) -> None:
        """One group's thread: a TorchTrainer at a time, until the pool closes or has no room for it."""
        idle_starts = 0
        while not self._retires(group):
            try:
                GroupTrainer(group, self.broker, self._shape, self._storage).fit()
                error: Exception | None = None
            except Exception as failure:  # noqa: BLE001 - whatever ended the trainer, the group is rebuilt
                logger.warning("worker group %s ended: %s", group, failure)
                error = failure
            if self._closing.is_set():
                return
            if error is not None:
                self.check()
            served = ray.get(self.broker.served.remote(group))
            ray.get(self.broker.lost.remote(group))
            # A group that finds no room is no worse for it: others have it, or its node is gone.
            idle_starts = 0 if served or found_no_room(error) else idle_starts + 1
            if idle_starts >= _IDLE_STARTS_ALLOWED:
                said = str(error).strip().splitlines() or [""]  # ends with the exception; the log has it all
                ray.get(self.broker.abort.remote(f"the workers of a trial can't be started: {said[-1]}"))
                return

    def _retires(self, group: str) -> bool:
        """Whether the group is one too many; then it is counted no more."""
        with self._lock:
            if self._closing.is_set():
                return True
            if len(self._threads) <= self.size:
                return False
            logger.warning("worker group %s is closed: the cluster has no room for it now", group)
            del self._threads[group]
            return True
