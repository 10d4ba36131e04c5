"""Distances of classes against the taxonomy's own, and against a walk up the tree."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hiertune import Taxonomy
from hiertune.metrics import class_distances

TAXONOMY = Taxonomy.from_parents(
    ["a", "b", "c"], [[-1, -1], [0, 1, 1, -1], [0, 0, 1, 2, 3, 3, -1, -1]]
)  # orphans at both lower levels


def pairs(level: int) -> tuple[np.ndarray, np.ndarray]:
    classes = np.arange(TAXONOMY.num_classes[level])
    a, b = np.meshgrid(classes, classes)
    return a.ravel(), b.ravel()


def distances(level: int, a, b) -> list[int]:
    ancestors = torch.tensor(TAXONOMY.ancestors(level))
    return class_distances(ancestors, torch.as_tensor(a), torch.as_tensor(b)).tolist()


def walk(level: int, a: int, b: int) -> int:
    """Ranks not shared: climb from both classes until they meet."""
    climbed = 0
    while a >= 0 and b >= 0 and a != b:
        a, b = TAXONOMY.parents[level - climbed][a], TAXONOMY.parents[level - climbed][b]
        climbed += 1
    return climbed if a == b >= 0 else level + 1


@pytest.mark.parametrize("level", [0, 1, 2])
def test_equal_a_walk_up_the_tree_and_the_taxonomy(level):
    a, b = pairs(level)
    ours = distances(level, a, b)
    assert ours == [walk(level, i, j) for i, j in zip(a.tolist(), b.tolist(), strict=True)]
    assert ours == TAXONOMY.class_distances(level, a, b).tolist()


def test_examples():
    assert distances(2, [0, 0, 2, 0, 4, 4, 6], [0, 1, 3, 2, 5, 0, 7]) == [0, 1, 2, 3, 1, 3, 3]


def test_an_unknown_class_shares_nothing():
    assert distances(2, [-1, 0, -1], [0, -1, -1]) == [3, 3, 3]
