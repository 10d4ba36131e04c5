"""What weights start from: how often each class occurs in training, and how many labels are known at all."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hiertune.config import ClassWeightsConfig
from hiertune.taxonomy import Taxonomy


def class_weights(
    config: ClassWeightsConfig, labels: npt.NDArray[np.int64], taxonomy: Taxonomy
) -> list[Tensor | None]:
    """Per level the weight of each class `[C_l]`, float32; None for the method `none`.

    `labels` `[N, L]` are those of the training rows; unknown ones (-1) count nowhere. With `n` rows of a
    class among `total` known ones, weights before scaling are

    - `smoothing`: total / (n + smoothing)
    - `capping`: min(total / n, cap)
    - `exponential`: base ** min(total / n, cap)
    - `logarithmic`: 1 / (1 + log_base(1 + (base - 1) * n / total)), from 1 for rare classes to 1/2

    They are then scaled so that their mean over the training rows is one. A class without a training
    row is not part of that, and weighs one.
    """
    if config.method == "none":
        return [None] * taxonomy.num_levels
    weights: list[Tensor | None] = []
    for level, size in enumerate(taxonomy.num_classes):
        known = labels[labels[:, level] >= 0, level]
        weights.append(torch.from_numpy(_weights(config, np.bincount(known, minlength=size))).float())
    return weights


def _weights(config: ClassWeightsConfig, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    weights = np.ones(len(counts))
    seen = counts > 0
    if seen.any():
        rows = counts[seen].astype(np.float64)
        raw = _raw_weights(config, rows, rows.sum())
        weights[seen] = raw * (rows.sum() / (rows * raw).sum())
    return weights


def _raw_weights(
    config: ClassWeightsConfig, rows: npt.NDArray[np.float64], total: float
) -> npt.NDArray[np.float64]:
    """Weights up to a common factor; `rows` are above zero."""
    if config.method == "smoothing":
        return total / (rows + config.smoothing)
    capped = np.minimum(total / rows, config.cap)
    if config.method == "capping":
        return capped
    if config.method == "exponential":
        return config.base ** (capped - capped.max())  # relative to the largest: cannot overflow
    return 1.0 / (1.0 + np.log1p((config.base - 1.0) * rows / total) / np.log(config.base))
