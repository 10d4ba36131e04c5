"""What a weighting is to the training loop. Shapes: T tasks, one per level, coarse -> fine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hiertune.models.classifier import HierarchicalClassifier


class Weighting:
    """Weights of the levels' losses, the same on every rank. These stay as they are; subclasses learn them.

    A subclass overrides the hooks that it learns from: gradients (`wants_update`, `update`), the losses
    of every step (`after_step`), or those of every epoch (`after_epoch`). All ranks call them alike.
    """

    whole_step = False
    """Whether `update` gets every forward pass of a step, not the last one alone."""

    def __init__(self, levels: Sequence[str], weights: Tensor) -> None:
        self.levels = tuple(levels)
        self.weights = weights
        """`[T]` float32, positive; what learns replaces this tensor and never writes into it."""

    def wants_update(self, step: int) -> bool:
        """Whether to call `update` in the step that follows `step` optimiser steps."""
        return False

    def update(
        self,
        model: HierarchicalClassifier,
        losses: Sequence[Tensor],
        known_counts: Tensor,
        base_losses: Callable[[], Sequence[Tensor]],
        last: bool = True,
    ) -> None:
        """Learn from the forward that `model` (not its DDP wrapper) still holds, before its backward.

        `losses` are T scalars with their graph, each the sum over this rank's rows over the number of
        known labels in the *global* batch, `known_counts` `[T]`, so that they sum to the global mean
        over ranks. The batch is that of the last pass or, with `whole_step`, of all passes of the step
        together; `last` says that no further pass of it will follow. A list, not one stacked tensor,
        whose graph would join all heads. `base_losses` gives the same losses of `model.base_logits`; it
        is called only if they are needed.
        """

    def after_step(self, losses: Tensor, known_counts: Tensor) -> None:
        """Learn from this rank's share `[T]` of a whole step's losses; `known_counts` as in `update`."""

    def after_epoch(self, losses: Tensor) -> None:
        """Learn from the epoch's mean losses `[T]` over all rows of all ranks; 0 for levels never known."""

    def report(self) -> dict[str, float]:
        """What to log: `weight/<level>`, and what a subclass measured in its last update."""
        return named("weight", self.levels, self.weights)

    def state_dict(self) -> dict[str, Any]:
        """All that the next weights depend on: tensors and plain values."""
        return {"weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = state["weights"].to(self.weights.device)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of every rank's `tensor`. In place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def named(name: str, levels: Sequence[str], values: Tensor) -> dict[str, float]:
    """`name/<level>` for every finite value."""
    pairs = zip(levels, values.tolist(), strict=True)
    return {f"{name}/{level}": value for level, value in pairs if math.isfinite(value)}


def sum_to_count(weights: Tensor) -> Tensor:
    """`weights` `[T]` scaled to sum to T."""
    return weights * (len(weights) / weights.sum())


def ones(levels: Sequence[str], device: torch.device | str) -> Tensor:
    return torch.ones(len(levels), device=device)
