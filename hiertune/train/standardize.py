"""Mean and deviation of every input over the training rows."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
import torch

from hiertune.data import HierarchicalDataset
from hiertune.models.backbones import Standardization

_BLOCK_ROWS = 1024

_known: WeakKeyDictionary[HierarchicalDataset, dict[tuple[str, ...], Standardization]] = WeakKeyDictionary()


def standardization(data: HierarchicalDataset, splits: tuple[str, ...]) -> Standardization:
    """Mean and population deviation `[D]` float64 of the inputs in `splits`, images flattened.

    Kept for as long as the data set is. Every worker computes it by itself from all rows, in numpy, so
    that it depends neither on how many there are nor on their threads.
    """
    of_data = _known.setdefault(data, {})
    if splits not in of_data:
        of_data[splits] = _measure(data, data.rows(*splits))
    return of_data[splits]


def _measure(data: HierarchicalDataset, rows: np.ndarray) -> Standardization:
    # deviations from about the mean: sums of squares of the inputs themselves could cancel
    origin = _block(data, rows[:_BLOCK_ROWS]).mean(0)
    total, squares = np.zeros_like(origin), np.zeros_like(origin)
    for start in range(0, len(rows), _BLOCK_ROWS):
        deviations = _block(data, rows[start : start + _BLOCK_ROWS]) - origin
        total += deviations.sum(0)
        squares += np.einsum("nd,nd->d", deviations, deviations)
    mean = total / len(rows)
    variance = np.maximum(squares / len(rows) - mean**2, 0.0)
    return torch.from_numpy(origin + mean), torch.from_numpy(np.sqrt(variance))


def _block(data: HierarchicalDataset, rows: np.ndarray) -> np.ndarray:
    return data.inputs.rows(rows).flatten(1).numpy().astype(np.float64)
