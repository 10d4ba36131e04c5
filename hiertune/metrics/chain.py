"""Is the whole path right? Shapes: N rows, L levels; -1 is an unknown label."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def chain_accuracy(predictions: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Share of the rows known at every level that are predicted right at every level.

    Both `[N, L]`, integers. 0.0 if no row is known at every level.
    """
    right, rows, _, _ = chain_counts(*_checked(predictions, labels)).tolist()
    return right / rows if rows else 0.0


def partial_chain_accuracy(predictions: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Share of the rows known at some level that are predicted right at every level where they are known.

    Both `[N, L]`, integers. 0.0 if no row is known anywhere.
    """
    _, _, right, rows = chain_counts(*_checked(predictions, labels)).tolist()
    return right / rows if rows else 0.0


def chain_counts(predictions: Tensor, labels: Tensor) -> Tensor:
    """Counts `[4]`: rows right and rows known at every level; rows right where known and known anywhere."""
    known = labels >= 0
    right = ((predictions == labels) | ~known).all(1)
    whole, some = known.all(1), known.any(1)
    return torch.stack([right & whole, whole, right & some, some]).sum(1)


def as_tensor(values: npt.ArrayLike) -> Tensor:
    """A tensor as it is, anything else copied, for its array may be read-only."""
    return values if isinstance(values, Tensor) else torch.tensor(np.asarray(values))


def _checked(predictions: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Tensor, Tensor]:
    predicted, given = as_tensor(predictions), as_tensor(labels)
    if predicted.ndim != 2 or predicted.shape != given.shape:
        shapes = f"{list(predicted.shape)} and {list(given.shape)}"
        raise ValueError(f"predictions and labels must both be [rows, levels], but are {shapes}")
    return predicted, given
