"""Gloo between nodes.

Gloo binds to what the host name resolves to, and on many systems that is the loopback address: a group
within one node works, one across nodes does not find itself. So each worker of such a group is told the
interface by which Ray reaches its node.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import ray
from ray.train.torch import TorchConfig


@dataclass
class ProcessGroup(TorchConfig):
    """Ray Train's process group, with gloo on the interfaces of its nodes where it spans several."""

    @property
    def backend_cls(self):
        return _Backend


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]  # Ray names it by this property only
    def on_start(self, worker_group, backend_config):
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
    import psutil  # Ray brings it along, and can only be asked after it is loaded

    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.split("%")[0] == address for each in addresses):
            return name
    return None
