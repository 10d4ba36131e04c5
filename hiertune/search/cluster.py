"""Where a search runs: this machine, or the Ray cluster that it was started in."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import ray_constants
from ray.autoscaler.sdk import request_resources
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hiertune._process import end_families
from hiertune.search.capacity import GroupShape

logger = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 256 * 2**20
"""Only handles and epoch results travel through Ray; each worker reads the data from its file."""

_REJOIN_S = 3.0
_LAST_CALL_S = 15.0
"""How long a call of Ray that goes on in another thread is waited for: they all have limits below that."""

ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    # How soon a lost worker is noticed, and how soon a group that went home is gone.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # One more process per group; a node that is taken away costs its groups one epoch at most.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
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
    """RAY_ADDRESS names a cluster that can't be joined; or Ray does not start on this machine."""


def own_ray() -> bool:
    """Whether a search starts Ray itself, on this machine. `ray job submit` sets RAY_ADDRESS."""
    return not os.environ.get("RAY_ADDRESS")  # Ray takes an empty one for none, too


def connect(patience_s: float = 0.0) -> None:
    """Join the cluster of this environment, or start Ray here.

    A closing terminal sends SIGHUP to all processes in it. This one handles it; Ray's, which inherit the
    mask, must live on until the epochs are over. (Of Ctrl-C Ray takes care.)

    Raises Unreachable if there is no such cluster for `patience_s`, or Ray does not start.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        _connect(patience_s)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})


def _connect(patience_s: float) -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if not own_ray():
        _join(time.monotonic() + patience_s, quiet)
        return
    # Workers import the hiertune that runs here, installed or not.
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    interfaces = {name: os.environ.get(name, value) for name, value in _LOOPBACK_ONLY.items()}
    with _on_loopback():
        protect_token()
        try:
            ray.init(
                address="local",  # by itself it would join what somebody has begun here by `ray start`
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                runtime_env={"env_vars": {"PYTHONPATH": path, **interfaces}},
                **quiet,
            )
        except Exception as error:  # Ray raises what its many parts do: a full disk, a long path, a limit
            advice = "`hiertune doctor --start-ray` looks for the cause"
            raise Unreachable(f"Ray does not start on this machine: {error}; {advice}") from error


_NO_CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's switch between "may have other nodes" and "is this machine alone", which is what it says on Linux
too: off, every server of Ray (GCS, raylet, dashboard, agents, workers, metrics) listens on loopback alone.
`ray.init(_node_ip_address="127.0.0.1")` does not: Ray replaces that address by the machine's."""

_LOOPBACK_ONLY = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
"""Workers of one machine talk on loopback, whatever the host's name resolves to."""


def is_local() -> bool:
    """Whether Ray is, or would be, started here for this machine alone."""
    return own_ray() and os.environ.get(_NO_CLUSTER, "0") in ("0", "false")


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that starts in here is for this machine alone, unless the user has set the switch."""
    if _NO_CLUSTER in os.environ:
        yield
        return
    enabled = ray_constants.ENABLE_RAY_CLUSTER  # read from the environment when Ray is imported: too early
    os.environ[_NO_CLUSTER] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        del os.environ[_NO_CLUSTER]
        ray_constants.ENABLE_RAY_CLUSTER = enabled


def protect_token() -> None:
    """See to it that a Ray started here asks for a token, and that only this user can read it.

    Ray asks for one unless RAY_AUTH_MODE says otherwise, and makes one in ~/.ray/auth_token where there is
    none, but readable for everybody. A token that the user keeps elsewhere (RAY_AUTH_TOKEN,
    RAY_AUTH_TOKEN_PATH) is left alone.
    """
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    path = Path.home() / ".ray" / "auth_token"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "w", encoding="ascii") as file:
                file.write(secrets.token_hex(32))
        path.chmod(0o600)
    except OSError as error:  # somebody else's, or a home that can't be written: Ray says what it needs
        logger.warning("the permissions of Ray's token %s can't be tightened: %s", path, error)


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


_THREAD = "hiertune-ray"


def thread(target: Callable[..., None], *args: Any) -> threading.Thread:
    """A daemon thread that calls Ray, not started yet. `disconnect` has to know of it."""
    return threading.Thread(target=target, args=args, name=_THREAD, daemon=True)


def is_in_use() -> bool:
    """Whether threads of this process call Ray."""
    return any(each.name == _THREAD for each in threading.enumerate())


def disconnect(patience_s: float = _LAST_CALL_S) -> None:
    """Leave Ray, and end it if it was started here, once no thread calls it any more.

    Ray's native code crashes, and the process with it, if it is taken down under a thread. So one that is
    still there after `patience_s` leaves Ray to the end of the process, which has to be `interrupt.leave`.
    """
    deadline = time.monotonic() + patience_s
    for each in threading.enumerate():
        if each.name == _THREAD and each is not threading.current_thread():
            each.join(max(0.0, deadline - time.monotonic()))
    if is_in_use():
        logger.warning("Ray is in use to the end of the process")
    else:
        ray.shutdown()


def kill() -> None:
    """End the Ray that was started here, if any, without leaving it: for a process that is about to end.

    It would end with the process anyway, but for two agents, which take 60 to 90 s to notice.
    """
    node = ray._private.worker._global_node
    if node is None or not own_ray():
        return
    parents = []
    for each in itertools.chain(*node.all_processes.values()):
        with contextlib.suppress(psutil.Error):
            parents.append(psutil.Process(each.process.pid))
    end_families(parents)


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
