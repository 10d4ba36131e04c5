"""The processes that train one trial together: who this one is, and the few things they agree on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from hiertune.errors import InputError


@dataclass(frozen=True)
class Workers:
    """This process among the workers of a trial; alone if no process group is initialised."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Workers:
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of every worker's `values`, bit-identical on all of them. In place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def least(self, values: torch.Tensor) -> torch.Tensor:
        """The smallest of every worker's `values`. In place."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MIN)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """An InputError that one worker raises within is raised by all, after it. No collectives within."""
        error: InputError | None = None
        try:
            yield
        except InputError as own:
            error = own
        if self.size > 1:
            errors: list[InputError | None] = [None] * self.size
            dist.all_gather_object(errors, error)
            error = error or next(filter(None, errors), None)
        if error is not None:
            raise error

    def from_first(self, payload: bytes | None, device: torch.device) -> bytes | None:
        """The first worker's payload, on all of them."""
        if self.size == 1:
            return payload
        box = [payload]
        dist.broadcast_object_list(box, src=0, device=device)
        return box[0]
