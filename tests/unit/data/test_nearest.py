from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertune.data import nearest, nearest_neighbour_predictions


def naive(train, labels, test):
    """By the definition, one pair at a time."""

    def cosine(a, b):
        norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
        return sum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0

    predictions = []
    for row in test:
        similarities = [cosine(row, other) for other in train]
        predictions.append([])
        for level in range(len(labels[0])):
            known = [i for i in range(len(train)) if labels[i][level] >= 0]
            best = max(known, key=lambda i: similarities[i], default=None)
            predictions[-1].append(-1 if best is None else labels[best][level])
    return predictions


@settings(deadline=None)
@given(seed=st.integers(0, 1000), num_train=st.integers(1, 12), num_test=st.integers(1, 9))
def test_against_a_naive_loop(seed, num_train, num_test):
    rng = np.random.default_rng(seed)
    train, test = rng.normal(size=(num_train, 4)), rng.normal(size=(num_test, 4))
    labels = rng.integers(-1, 3, (num_train, 3))
    found = nearest_neighbour_predictions(torch.from_numpy(train), labels, torch.from_numpy(test))
    assert found.dtype == np.int64
    assert found.tolist() == naive(train.tolist(), labels.tolist(), test.tolist())


@pytest.mark.parametrize("similarities", [1, 10, 25, 10**6])
def test_chunks_do_not_matter(monkeypatch, similarities):
    monkeypatch.setattr(nearest, "SIMILARITIES", similarities)
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(10, 4)), rng.normal(size=(7, 4))
    labels = rng.integers(-1, 5, (10, 2))
    found = nearest_neighbour_predictions(torch.from_numpy(train), labels, torch.from_numpy(test))
    assert found.tolist() == naive(train.tolist(), labels.tolist(), test.tolist())


def test_each_level_takes_the_nearest_row_known_there():
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    labels = np.array([[0, -1, -1], [1, 2, -1], [2, 3, -1]])
    found = nearest_neighbour_predictions(train, labels, torch.tensor([[5.0, 0.0], [0.0, 0.1]]))
    assert found.tolist() == [[0, 2, -1], [2, 3, -1]]


def test_length_of_a_row_does_not_matter_and_the_first_of_equals_wins():
    train = torch.tensor([[0.0, 3.0], [1.0, 1.0], [7.0, 7.0]])
    found = nearest_neighbour_predictions(train, np.array([[0], [1], [2]]), torch.tensor([[100.0, 99.0]]))
    assert found.tolist() == [[1]]
