"""The worker groups of a search: each one TorchTrainer, kept alive and fed with jobs."""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from hiertune.search.broker import Broker
from hiertune.search.capacity import GroupShape
from hiertune.search.follower import Follower
from hiertune.search.messages import Failed, Finished, Job, Reported, WorkerSetup
from hiertune.search.processes import RayProcesses

logger = logging.getLogger(__name__)

_RESTARTS_PER_TRAINER = 5
_IDLE_STARTS_ALLOWED = 2
_GOODBYE_S = 30.0
"""How long idle workers may take to go home; whoever stays is ended with the cluster."""
_GOODBYE_AFTER_ERROR_S = 5.0


class WorkerPool:
    """`size` worker groups and the broker that feeds them. Use as a context manager.

    The groups live in the driver's care, not in Tune's: Tune keeps an idle trial actor only when
    another trial happens to be pending, and a group takes 15 s to start.
    """

    def __init__(self, size: int, shape: GroupShape, storage: Path, recycle_after: int | None = None):
        self.broker_name = f"hiertune-broker-{uuid.uuid4().hex}"
        # A broker that dies starts again and knows nothing: workers and submitters come to it anew.
        actor = ray.remote(Broker).options(
            num_cpus=0, max_concurrency=10_000, name=self.broker_name, max_restarts=-1, max_task_retries=-1
        )
        self.broker: Any = actor.remote(recycle_after, RayProcesses())
        self._shape = shape
        self._storage = storage
        self.size = size
        self._closing = False
        self._threads = [
            threading.Thread(target=self._keep_alive, args=(f"group-{index}",), daemon=True)
            for index in range(size)
        ]

    def __enter__(self) -> WorkerPool:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, error_type, error, trace) -> None:
        self.close(_GOODBYE_S if error is None else _GOODBYE_AFTER_ERROR_S)

    def run(self, job: Job) -> Finished | Failed:
        """Train one job outside Tune, to its end."""
        follower = Follower(self.broker, job)
        while True:
            event = follower.next()
            for incident in event.incidents:
                logger.warning("%s goes on after epoch %d: %s", job.id, incident.epoch, incident.reason)
            if not isinstance(event, Reported):
                follower.stop()
                return event
            for note in event.result.notes:
                logger.info("%s: %s", job.id, note)

    def close(self, timeout_s: float) -> None:
        """Send the workers home and wait until their trainers are gone."""
        self._closing = True
        try:
            ray.get(self.broker.close.remote())
        except RayError as error:  # after an interruption Ray may be half gone; so are the workers then
            logger.warning("the worker groups could not be told to go home: %s", error)
            return
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        ray.kill(self.broker)

    def _keep_alive(self, group: str) -> None:
        """One group's thread: a TorchTrainer at a time, until the pool closes."""
        idle_starts = 0
        while not self._closing:
            try:
                self._trainer(group).fit()
                error: Exception | None = None
            except Exception as failure:  # noqa: BLE001 - whatever ended the trainer, the group is rebuilt
                logger.warning("worker group %s ended: %s", group, failure)
                error = failure
            if self._closing:
                return
            served = ray.get(self.broker.served.remote(group))
            ray.get(self.broker.lost.remote(group))
            idle_starts = 0 if served else idle_starts + 1
            if idle_starts >= _IDLE_STARTS_ALLOWED:
                said = str(error).strip().splitlines() or [""]  # ends with the exception; the log has it all
                ray.get(self.broker.abort.remote(f"the workers of a trial can't be started: {said[-1]}"))
                return

    def _trainer(self, group: str) -> TorchTrainer:
        return TorchTrainer(
            _work,
            train_loop_config={"setup": WorkerSetup(group, self.broker)},
            torch_config=TorchConfig(backend="nccl" if self._shape.gpus_per_worker else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=self._shape.workers,
                use_gpu=self._shape.gpus_per_worker > 0,
                resources_per_worker=self._shape.per_worker,
            ),
            run_config=RunConfig(
                name=group,
                storage_path=str(self._storage),
                failure_config=FailureConfig(max_failures=_RESTARTS_PER_TRAINER),
                worker_runtime_env={"env_vars": worker_environment()},  # type: ignore[call-arg]  # of Train V2
            ),
        )


def _work(config: dict) -> None:
    # Imported here: Ray Train's controller unpickles this function too, and the workers wait for it.
    from hiertune.search.worker import work

    work(config)


def worker_environment() -> dict[str, str]:
    """One compute thread per worker from the first import on; `train.threads` changes it per trial."""
    return {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
