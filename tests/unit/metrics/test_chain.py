"""Chain accuracies against a loop over rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from hiertune.metrics import chain_accuracy, partial_chain_accuracy


def naive(predictions, labels) -> tuple[float, float]:
    whole, partial = [], []
    for predicted, label in zip(predictions, labels, strict=True):
        known = [(p, y) for p, y in zip(predicted, label, strict=True) if y >= 0]
        if known:
            partial.append(all(p == y for p, y in known))
        if len(known) == len(label):
            whole.append(all(p == y for p, y in known))
    return tuple(sum(rows) / len(rows) if rows else 0.0 for rows in (whole, partial))


@st.composite
def predictions_and_labels(draw):
    shape = draw(st.tuples(st.integers(0, 12), st.integers(1, 4)))
    arrays = npst.arrays(np.int64, shape, elements=st.integers(-1, 2))
    return draw(arrays), draw(arrays)


@settings(deadline=None)
@given(predictions_and_labels())
def test_equal_a_loop_over_rows(pair):
    assert (chain_accuracy(*pair), partial_chain_accuracy(*pair)) == naive(*pair)


def test_an_example():
    labels = [[0, 1, 2], [0, 1, -1], [-1, -1, -1], [1, -1, 3]]
    predictions = [[0, 1, 2], [0, 1, 9], [5, 5, 5], [1, 7, 4]]
    assert chain_accuracy(predictions, labels) == 1.0  # the one row known everywhere
    assert partial_chain_accuracy(predictions, labels) == 2 / 3


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, list])
@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64])
def test_arrays_tensors_and_lists(kind, dtype):
    predictions, labels = (np.array(rows, dtype) for rows in ([[1, 2], [1, 3]], [[1, 2], [1, -1]]))
    assert partial_chain_accuracy(kind(predictions), kind(labels)) == 1.0
    assert chain_accuracy(kind(predictions), kind(labels)) == 1.0


@pytest.mark.parametrize("shapes", [((3, 2), (3, 3)), ((3, 2), (2, 2)), ((3,), (3,))])
def test_wrong_shapes_are_named(shapes):
    for metric in (chain_accuracy, partial_chain_accuracy):
        with pytest.raises(ValueError, match="must both be") as error:
            metric(*(np.zeros(shape, np.int64) for shape in shapes))
        assert all(str(list(shape)) in str(error.value) for shape in shapes)
