"""The nearest neighbour: the control that needs no training."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import normalize

SIMILARITIES = 2**24
"""Similarities held in memory at a time."""


def nearest_neighbour_predictions(
    train_inputs: torch.Tensor, train_labels: np.ndarray, test_inputs: torch.Tensor
) -> np.ndarray:
    """Labels int64 [N, L] of the training row with the largest cosine similarity to each test row.

    train_inputs: float [M, D]; train_labels: integer [M, L], -1 unknown; test_inputs: float [N, D].
    Each level takes the nearest training row whose label is known there, of equally near ones the
    first; a level without any known training label gives -1.
    """
    labels = torch.from_numpy(np.asarray(train_labels, np.int64)).to(train_inputs.device)
    directions = normalize(train_inputs, dim=1).T
    step = max(1, SIMILARITIES // len(train_inputs))
    chunks = [
        _labels_of_most_similar(normalize(chunk, dim=1) @ directions, labels)
        for chunk in test_inputs.split(step)
    ]
    return torch.cat(chunks).cpu().numpy()


def _labels_of_most_similar(similarities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[n, M] and [M, L] to [n, L]."""
    columns = []
    for label in labels.T:
        nearest = similarities.masked_fill(label < 0, -torch.inf).argmax(dim=1)
        columns.append(label[nearest])
    return torch.stack(columns, dim=1)
