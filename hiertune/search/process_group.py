"""torch's process group: how the workers of a group find each other, and on which network interface."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend

_LOOPBACK = "127.0.0.1"


# --------------------------------------------------------------------------------------- one machine


@dataclass
class LocalProcessGroup(TorchConfig):
    """As TorchConfig, for workers of one machine: nothing listens on another interface.

    By itself torch's store, where the workers leave their addresses, listens on all interfaces and asks
    nobody who they are.
    """

    @property
    def backend_cls(self):
        return _LocalBackend


class _LocalBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        port = worker_group.execute_single(0, _host_store, len(worker_group), backend_config.timeout_s)
        worker_group.execute(_point_to_store, port)
        worker_group.execute(_set_torch_distributed_env_vars)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank,
                    _setup_torch_process_group,
                    backend=backend_config.backend,
                    world_rank=rank,
                    world_size=len(worker_group),
                    init_method="env://",
                    timeout_s=backend_config.timeout_s,
                )
                for rank in range(len(worker_group))
            ]
        )


_kept: list[Any] = []
"""The store that a first worker hosts, for as long as its process lives."""


def _host_store(workers: int, timeout_s: int) -> int:
    """In the first worker: open the store on loopback; returns its port."""
    with socket.socket() as listener:
        listener.bind((_LOOPBACK, 0))
        listener.listen()
        port = listener.getsockname()[1]
        limit = timedelta(seconds=timeout_s)
        fd = listener.detach()
    _kept[:] = [dist.TCPStore(_LOOPBACK, port, workers, True, limit, False, master_listen_fd=fd)]
    return port


def _point_to_store(port: int) -> None:
    """In each worker: join the store that is there already, as torchrun's workers do."""
    os.environ.update(MASTER_ADDR=_LOOPBACK, MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")


# ------------------------------------------------------------------------------------- several nodes


@dataclass
class ProcessGroup(TorchConfig):
    """As TorchConfig, with gloo on the interfaces of its nodes where the group spans several.

    Gloo binds to what the host name resolves to, and on many systems that is the loopback address: a group
    within one node works, one across nodes does not find itself. So each worker of such a group is told the
    interface by which Ray reaches its node.
    """

    @property
    def backend_cls(self):
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        if len({worker.metadata.node_id for worker in worker_group.get_workers()}) > 1:
            worker_group.execute(use_interface_of_node)
        super().on_start(worker_group, backend_config)


def use_interface_of_node() -> None:
    """Unless the user has named one."""
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface_of(address: str) -> str | None:
    """The network interface that has `address`."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.split("%")[0] == address for each in addresses):
            return name
    return None
