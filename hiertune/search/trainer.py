"""One worker group: a TorchTrainer whose workers take jobs from the broker."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray
from ray._private.state import state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.placement_group import PlacementGroup, remove_placement_group

from hiertune.search.capacity import GroupShape
from hiertune.search.cluster import is_local
from hiertune.search.messages import WorkerSetup
from hiertune.search.process_group import LocalProcessGroup, ProcessGroup

_RESTARTS = 5
"""Of the workers, before the trainer itself is made anew."""

_NOT_NEEDED = {
    "DatasetsCallback",  # splits Ray Data's sets among the workers; these read their file
    "PlacementGroupCleanerCallback",  # see `free_lost_places`
}
"""Callbacks of Ray Train that start an actor each: 2 s of a core and 200 MB per worker group."""


class GroupTrainer(TorchTrainer):
    """The workers of `group`, in the given shape, at work for `broker`. Ray Train writes to `storage`."""

    def __init__(self, group: str, broker: Any, shape: GroupShape, storage: Path):
        super().__init__(
            _work,
            train_loop_config={"setup": WorkerSetup(group, broker)},
            torch_config=(LocalProcessGroup if is_local() else ProcessGroup)(backend=shape.backend),
            scaling_config=ScalingConfig(
                num_workers=shape.workers,
                use_gpu=shape.gpus_per_worker > 0,
                resources_per_worker=shape.per_worker,
                placement_strategy=shape.placement.upper(),
            ),
            run_config=RunConfig(
                name=group,
                storage_path=str(storage),
                # Without room within RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S the pool decides what to do.
                failure_config=FailureConfig(_RESTARTS, controller_failure_limit=0),  # type: ignore[call-arg]
                worker_runtime_env={"env_vars": worker_environment()},  # type: ignore[call-arg]  # of Train V2
            ),
        )

    def _create_default_callbacks(self) -> list:
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # of Train V2
        return [callback for callback in callbacks if type(callback).__name__ not in _NOT_NEEDED]


def _work(config: dict) -> None:
    # Imported here: Ray Train's controller unpickles this function too, and the workers wait for it.
    from hiertune.search.worker import work

    work(config)


def worker_environment() -> dict[str, str]:
    """One compute thread per worker from the first import on; `train.threads` changes it per trial."""
    return {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}


def found_no_room(error: Exception | None) -> bool:
    """Whether a trainer ended because the cluster had no place for its workers."""
    return "WorkerGroupStartupTimeoutError" in repr(getattr(error, "controller_failure", error))


def free_lost_places() -> None:
    """Take back the placement groups of controllers that died without doing so.

    Ray takes them back once the search is over; until then no other group could have their place. (Ray
    Train's own remedy asks the dashboard, and knows a placement group only after its workers have started.)
    """
    job = ray.get_runtime_context().get_job_id()
    for entry in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(entry)
        if group.creator_job_id.hex() != job or group.state == PlacementGroupTableData.REMOVED:
            continue
        # Those that Tune makes in the driver have no actor, which Ray calls a dead one.
        if group.creator_actor_dead and not ray.ActorID(group.creator_actor_id).is_nil():
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
