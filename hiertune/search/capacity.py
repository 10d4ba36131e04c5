"""What a worker group asks for, and how many fit. No Ray: checked before anything starts."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from hiertune.config import SearchSection
from hiertune.errors import InputError


@dataclass(frozen=True)
class GroupShape:
    """What one worker group (the DDP processes that train one trial) asks of the cluster."""

    workers: int
    cpus_per_worker: float
    gpus_per_worker: float

    @classmethod
    def of(cls, search: SearchSection, nodes: list[dict[str, float]]) -> GroupShape:
        """The shape that `search` asks for on a cluster of `nodes` (resources by Ray's names)."""
        gpus = search.gpus_per_worker
        if gpus is None:
            gpus = 1.0 if any(node.get("GPU", 0.0) for node in nodes) else 0.0
        return cls(search.workers_per_trial, search.cpus_per_worker, gpus)

    @property
    def per_worker(self) -> dict[str, float]:
        """Resources of one worker, by Ray's names; only what is above zero."""
        needs = {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker}
        return {name: amount for name, amount in needs.items() if amount > 0}


def groups_that_fit(shape: GroupShape, nodes: list[dict[str, float]], *, file: str | None = None) -> int:
    """How many groups of `shape` the nodes' resources hold together.

    A worker lives on one node; a group may span several. InputError, with the sum, where not even
    one group fits.
    """
    needs = shape.per_worker
    workers = sum(
        min(math.floor(node.get(name, 0.0) / amount + 1e-9) for name, amount in needs.items())
        for node in nodes
    )
    if workers >= shape.workers:
        return workers // shape.workers
    total = {name: sum(node.get(name, 0.0) for node in nodes) for name in needs}
    scarce = min(needs, key=lambda name: total[name] / needs[name])
    raise InputError(
        f"a trial needs {shape.workers} workers x {needs[scarce]:g} {scarce} = "
        f"{shape.workers * needs[scarce]:g} {scarce}, but there are {total[scarce]:g}: it could never start",
        file=file,
        key="search.workers_per_trial",
        allowed=f"at most {workers} such workers here, or fewer {scarce}s per worker",
    )


def local_nodes() -> list[dict[str, float]]:
    """This machine, as Ray would see it at the most."""
    import torch

    return [{"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(torch.cuda.device_count())}]
