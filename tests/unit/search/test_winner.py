"""The comparison of the winner with a control, against its definition."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from hiertune.search.winner import Comparison, Contender, compare


def test_the_difference_is_paired_by_row_and_only_of_rows_with_a_seen_class():
    train = np.array([0, 1, 2])
    truth = np.array([0, 1, 2, 0, 1, 3, -1])  # class 3 was never seen, the last row is not known
    winner = np.array([0, 1, 2, 0, 0, 3, 0])
    control = np.array([0, 1, 1, 1, 1, 0, 0])
    labels = np.concatenate([train, truth])[:, None]
    rows = {"train": np.arange(3), "test": np.arange(3, 10)}
    data = SimpleNamespace(labels=labels, rows=lambda *splits: np.concatenate([rows[s] for s in splits]))

    def contender(predictions):
        return Contender("", {}, predictions[:, None])

    found = compare(contender(winner), contender(control), data, ("train",))
    differences = [0, 0, 1, 1, -1]
    mean = sum(differences) / 5
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / 4)
    assert found.rows == 5
    assert found.difference == pytest.approx(mean)
    assert found.high - found.low == pytest.approx(2 * 1.96 * deviation / math.sqrt(5))
    # Two rows gained and one lost: of 3 fair coins, at least that uneven a split always happens.
    assert found.p_value == pytest.approx(1.0)


@pytest.mark.parametrize("known", [0, 1])
def test_one_row_compares_nothing(known):
    labels = np.concatenate([[0, 1], [0] * known, [-1] * (3 - known)])[:, None]
    rows = {"train": np.arange(2), "test": np.arange(2, 5)}
    data = SimpleNamespace(labels=labels, rows=lambda *splits: np.concatenate([rows[s] for s in splits]))
    one = Contender("", {}, np.zeros((3, 1), np.int64))
    assert compare(one, one, data, ("train",)) == Comparison(known, None, None, None, None)
