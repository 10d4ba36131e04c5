"""The one place where losses per row become one number per level."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn


def level_losses(
    losses: Iterable[nn.Module],
    logits: Mapping[str, Tensor],
    labels: Tensor,
    known_counts: Tensor,
    weights: Sequence[Tensor | None],
) -> list[Tensor]:
    """Loss of each level, coarse -> fine: weighted sum over known rows / known labels of the whole batch.

    `logits`: `[B, C_l]` per level, in the order of the levels; `labels`: `[B, L]`, -1 unknown;
    `known_counts`: `[L]`, known labels in the *global* batch, so that the results of all workers add up to
    its mean; `weights`: per level `[C_l]`, or None for no class weights. A level without a known
    label gives 0, with zero gradients.

    The result is a list: through a stacked tensor the gradient of one level's loss would visit the
    heads of all others.
    """
    reduced = []
    for level, (loss, of_level) in enumerate(zip(losses, logits.values(), strict=True)):
        known = labels[:, level] >= 0
        classes = labels[:, level].clamp(min=0)  # any class will do where the label is unknown
        per_row = loss(of_level, classes)
        class_weight = weights[level]
        if class_weight is not None:
            per_row = per_row * class_weight[classes]
        total = torch.where(known, per_row, 0.0).sum()
        reduced.append(total / known_counts[level].clamp(min=1))
    return reduced
