"""How the workers of a group find each other: torch's process group, on loopback where all are here."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend

_LOOPBACK = "127.0.0.1"
_kept: list[Any] = []
"""The store that a first worker hosts, for as long as its process lives."""


@dataclass
class LocalTorchConfig(TorchConfig):
    """As TorchConfig, for workers of one machine: nothing listens on another interface.

    By itself torch's store, where the workers leave their addresses, listens on all interfaces and asks
    nobody who they are.
    """

    @property
    def backend_cls(self):
        return _LocalTorchBackend


class _LocalTorchBackend(_TorchBackend):
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
