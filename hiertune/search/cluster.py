"""Where a search runs: this machine, or the Ray cluster that it was started in."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import ray

_OBJECT_STORE_BYTES = 256 * 2**20
"""Only handles and epoch results travel through Ray; each worker reads the data from its file."""

ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    # How soon a lost worker is noticed, and how soon a group that went home is gone.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_METRICS_ENABLED": "0",
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


def connect() -> None:
    """Join the cluster of this environment (`ray job submit` sets RAY_ADDRESS), or start Ray here.

    A closing terminal sends SIGHUP to all processes in it. This one handles it; Ray's, which inherit the
    mask, must live on until the epochs are over. (Of Ctrl-C Ray takes care.)
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        _connect()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})


def _connect() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if "RAY_ADDRESS" in os.environ:
        ray.init(**quiet)
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


def node_resources() -> list[dict[str, float]]:
    """Resources of every living node, by Ray's names."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
