"""The one place where losses per row become one number per level."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class MixedLabels:
    """The second labels of rows that are mixtures of two (mixup, cutmix)."""

    rows: Tensor
    """int64 `[M]`: which rows of the batch are mixtures."""
    labels: Tensor
    """int64 `[M, L]`: the labels of what they are mixed with, -1 unknown."""
    share: float
    """Weight of the rows' own labels; the others have the rest."""
    first_level: int
    """The first level at which the two may differ."""


def level_losses(
    losses: Iterable[nn.Module],
    logits: Mapping[str, Tensor],
    labels: Tensor,
    known_counts: Tensor,
    weights: Sequence[Tensor | None],
    mixed: MixedLabels | None = None,
) -> list[Tensor]:
    """Loss of each level, coarse -> fine: weighted sum over known rows / known labels of the whole batch.

    `logits`: `[B, C_l]` per level, in the order of the levels; `labels`: `[B, L]`, -1 unknown;
    `known_counts`: `[L]`, known labels in the *global* batch, so that the results of all workers add up to
    its mean; `weights`: per level `[C_l]`, or None for no class weights. A level without a known
    label gives 0, with zero gradients.

    The target of a `mixed` row is the mixture of both labels' targets. As every loss is linear in its target,
    that is the mixture of both losses: no distribution over the classes is made. `known_counts` then count
    both labels by their shares.

    The result is a list: through a stacked tensor the gradient of one level's loss would visit the
    heads of all others.
    """
    divisors = torch.where(known_counts > 0, known_counts, 1.0)
    reduced = []
    for level, (loss, of_level) in enumerate(zip(losses, logits.values(), strict=True)):
        per_row = _masked(loss, of_level, labels[:, level], weights[level])
        if mixed is None or level < mixed.first_level:
            total = per_row.sum()
        else:
            others = _masked(
                loss, of_level.index_select(0, mixed.rows), mixed.labels[:, level], weights[level]
            )
            own = torch.ones_like(per_row).index_fill_(0, mixed.rows, mixed.share)
            total = torch.dot(per_row, own) + (1.0 - mixed.share) * others.sum()
        reduced.append(total / divisors[level])
    return reduced


def _masked(loss: nn.Module, logits: Tensor, labels: Tensor, weight: Tensor | None) -> Tensor:
    """Weighted loss of each row `[B]`, 0 where the label is unknown."""
    known = labels >= 0
    classes = labels.clamp(min=0)  # any class will do where the label is unknown
    per_row = loss(logits, classes)
    if weight is not None:
        per_row = per_row * weight[classes]
    return torch.where(known, per_row, 0.0)
