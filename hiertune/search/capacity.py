"""What a worker group asks for, and how many fit. No Ray: checked before anything starts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from hiertune.config import SearchSection
from hiertune.errors import InputError

_UNIT = 10_000
"""Ray counts resources in ten-thousandths."""


@dataclass(frozen=True)
class GroupShape:
    """What one worker group (the DDP processes that train one trial) asks of the cluster."""

    workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    placement: Literal["pack", "spread"] = "pack"
    """Both are wishes: a group that fits only otherwise is placed otherwise."""

    @classmethod
    def of(cls, search: SearchSection, nodes: list[dict[str, float]]) -> GroupShape:
        """The shape that `search` asks for on a cluster of `nodes` (resources by Ray's names)."""
        gpus = search.gpus_per_worker
        if gpus is None:
            gpus = 1.0 if any(node.get("GPU", 0.0) for node in nodes) else 0.0
        return cls(search.workers_per_trial, search.cpus_per_worker, gpus, search.placement)

    @property
    def per_worker(self) -> dict[str, float]:
        """Resources of one worker, by Ray's names; only what is above zero."""
        needs = {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker}
        return {name: amount for name, amount in needs.items() if amount > 0}

    @property
    def backend(self) -> Literal["nccl", "gloo"]:
        """Of the collectives. NCCL refuses two workers on one GPU."""
        return "nccl" if self.gpus_per_worker >= 1 else "gloo"

    def fit(self, nodes: list[dict[str, float]]) -> int:
        """How many groups the nodes' resources hold together.

        A worker lives on one node; a group may span several, whether packed or spread. So wherever Ray
        puts a group, it takes as many places for workers as any other.
        """
        return sum(self.workers_on(node) for node in nodes) // self.workers

    def shortage(self, nodes: list[dict[str, float]]) -> str:
        """Why not one group fits, with the sum."""
        scarce = self.scarce(nodes)
        each = self.per_worker[scarce]
        asked, total = self.workers * each, _total(scarce, nodes)
        text = (
            f"a trial needs {self.workers} workers x {each:g} {scarce} = {asked:g} {scarce}, "
            f"but there are {total:g}"
        )
        if total >= asked:
            text += f", of which one node has at most {max(node.get(scarce, 0.0) for node in nodes):g}"
        return text

    def scarce(self, nodes: list[dict[str, float]]) -> str:
        """The resource that there is least of, beside what is needed."""
        needs = self.per_worker
        return min(needs, key=lambda name: _total(name, nodes) / needs[name])

    def workers_on(self, node: dict[str, float]) -> int:
        return min(_times(node.get(name, 0.0), amount, name) for name, amount in self.per_worker.items())


def _total(name: str, nodes: list[dict[str, float]]) -> float:
    return sum(node.get(name, 0.0) for node in nodes)


def _times(there: float, amount: float, name: str) -> int:
    """How often a node gives `amount` of a resource. A share of a GPU is of one GPU, never of two."""
    units, asked = round(there * _UNIT), max(1, round(amount * _UNIT))
    if name == "GPU" and asked < _UNIT:
        return units // _UNIT * (_UNIT // asked)
    return units // asked


def groups_that_fit(shape: GroupShape, nodes: list[dict[str, float]], *, file: str | None = None) -> int:
    """How many groups of `shape` fit. InputError, with the sum, where not even one does."""
    groups = shape.fit(nodes)
    if groups:
        return groups
    workers, scarce = sum(map(shape.workers_on, nodes)), shape.scarce(nodes)
    raise InputError(
        f"{shape.shortage(nodes)}: it could never start",
        file=file,
        key="search.workers_per_trial",
        allowed=f"at most {workers} such workers here, or fewer {scarce}s per worker",
    )


def local_nodes() -> list[dict[str, float]]:
    """This machine, as Ray would see it at the most."""
    import torch

    return [{"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(torch.cuda.device_count())}]
