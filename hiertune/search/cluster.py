"""Where a search runs: this machine, or the Ray cluster that it was started in."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hiertune.search.capacity import GroupShape

logger = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 256 * 2**20
"""Only handles and epoch results travel through Ray; each worker reads the data from its file."""

_REJOIN_S = 3.0

ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    # How soon a lost worker is noticed, and how soon a group that went home is gone.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # A group that finds no room gives up its place in the queue, so that the pool can close it.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    # A failed trial's result has no objective; the searcher knows what to do with it.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # The driver has its own: one Ctrl-C ends the search in order, two end it at once.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # The ledger is the record; Tune's own snapshot is never restored.
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_WARN_THRESHOLD_S": "5",
    "RAY_AIR_NEW_OUTPUT": "0",
}
"""What is set for a search, unless the user has set it."""


class Unreachable(Exception):
    """RAY_ADDRESS names a cluster that can't be joined."""


def own_ray() -> bool:
    """Whether a search starts Ray itself, on this machine. `ray job submit` sets RAY_ADDRESS."""
    return "RAY_ADDRESS" not in os.environ


def connect(patience_s: float = 0.0) -> None:
    """Join the cluster of this environment, or start Ray here.

    Raises Unreachable if there is no such cluster for `patience_s`.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if not own_ray():
        _join(time.monotonic() + patience_s, quiet)
        return
    # Workers import the hiertune that runs here, installed or not.
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    ray.init(
        object_store_memory=_OBJECT_STORE_BYTES,
        dashboard_host="127.0.0.1",
        runtime_env={"env_vars": {"PYTHONPATH": path}},
        **quiet,
    )


def _join(deadline: float, options: dict[str, Any]) -> None:
    while True:
        try:
            ray.init(**options)
            return
        except (ConnectionError, RuntimeError, ValueError) as error:
            if time.monotonic() > deadline:
                raise Unreachable(f"no Ray cluster at {os.environ['RAY_ADDRESS']}: {error}") from error
            logger.warning("the Ray cluster can't be joined yet: %s", error)
            time.sleep(_REJOIN_S)


def node_resources() -> list[dict[str, float]]:
    """Resources of every living node, by Ray's names."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """For actors that shall live and die with the driver: the death of another node costs workers only."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def this_node() -> dict[str, float]:
    """The same as a resource request, the smallest that Ray knows. Tune takes no affinity."""
    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    return {f"node:{node['NodeManagerAddress']}": 0.0001}


def ask_for(shape: GroupShape, groups: int) -> None:
    """Let a cluster that scales itself bring nodes for so many groups; others take no notice.

    There is one such request per cluster, which stays until the next one; 0 takes it back.
    """
    request_resources(bundles=[shape.per_worker] * (shape.workers * groups))
