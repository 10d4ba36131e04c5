"""Class weights by their formulas, one class at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertune import Taxonomy
from hiertune.config import ClassWeightsConfig
from hiertune.losses import class_weights

TAXONOMY = Taxonomy.from_parents(["a", "b"], [[-1, -1], [0, 0, 1, 1]])
LABELS = np.array([[0, 0]] * 40 + [[0, 1]] * 9 + [[1, 2]] + [[1, -1]] * 10)  # class 3 of b never occurs

FORMULAS = {
    "smoothing": lambda n, total: total / (n + 0.5),
    "capping": lambda n, total: min(total / n, 3.0),
    "exponential": lambda n, total: 2.0 ** min(total / n, 3.0),
    "logarithmic": lambda n, total: 1 / (1 + math.log(1 + (2 - 1) * n / total, 2)),
}


@pytest.mark.parametrize("method", FORMULAS)
def test_formula_scaled_to_a_mean_of_one_over_rows(method):
    config = ClassWeightsConfig(method=method, smoothing=0.5, cap=3.0, base=2.0)
    for level, weights in enumerate(class_weights(config, LABELS, TAXONOMY)):
        rows = [label for label in LABELS[:, level].tolist() if label >= 0]
        raw = {c: FORMULAS[method](rows.count(c), len(rows)) for c in set(rows)}
        mean = sum(raw[label] for label in rows) / len(rows)
        expected = [raw[c] / mean if c in raw else 1.0 for c in range(TAXONOMY.num_classes[level])]
        assert weights.tolist() == pytest.approx(expected)
        assert weights.dtype == torch.float32


@pytest.mark.parametrize(
    ("method", "raw"),
    [
        # of 60 known rows: 49 of class 0 and 11 of class 1; logs to base 10, totals capped at 20
        ("smoothing", [60 / 49.1, 60 / 11.1]),
        ("capping", [60 / 49, 60 / 11]),
        ("exponential", [10 ** (60 / 49), 10 ** (60 / 11)]),
        ("logarithmic", [1 / (1 + math.log10(1 + 9 * 49 / 60)), 1 / (1 + math.log10(1 + 9 * 11 / 60))]),
    ],
)
def test_the_defaults_by_hand(method, raw):
    weights = class_weights(ClassWeightsConfig(method=method), LABELS, TAXONOMY)[0]
    mean = (49 * raw[0] + 11 * raw[1]) / 60
    assert weights.tolist() == pytest.approx([raw[0] / mean, raw[1] / mean])


def test_the_cap_bounds_the_ratio_of_two_weights():
    counts = [3000, 1]
    labels = np.repeat([[0, 0], [1, 2]], counts, axis=0)
    common, rare = class_weights(ClassWeightsConfig(method="capping", cap=7.0), labels, TAXONOMY)[0].tolist()
    assert rare / common == pytest.approx(7.0 / (3001 / 3000))


def test_logarithmic_weights_stay_within_a_factor_of_two():
    labels = np.repeat([[0, 0], [1, 2]], [10**6, 1], axis=0)
    common, rare = class_weights(ClassWeightsConfig(method="logarithmic"), labels, TAXONOMY)[0].tolist()
    assert rare / common == pytest.approx(2.0, rel=1e-5)


def test_none_is_no_weights():
    assert class_weights(ClassWeightsConfig(), LABELS, TAXONOMY) == [None, None]


def test_a_level_without_any_known_label_weighs_one():
    weights = class_weights(ClassWeightsConfig(method="capping"), np.array([[0, -1]]), TAXONOMY)
    assert weights[1].tolist() == [1.0] * 4


def test_a_huge_base_does_not_overflow():
    config = ClassWeightsConfig(method="exponential", base=1e30, cap=1e6)
    counts = [10**6, 1]
    labels = np.repeat([[0, 0], [1, 2]], counts, axis=0)
    weights = class_weights(config, labels, TAXONOMY)[0]
    assert weights.tolist() == pytest.approx([0.0, sum(counts)])


@given(
    st.sampled_from(sorted(FORMULAS)),
    st.lists(st.sampled_from([(0, 0), (0, 1), (1, 2), (1, 3), (-1, -1)]), min_size=1, max_size=60),
)
@settings(deadline=None)
def test_rows_weigh_one_on_average_and_rare_classes_no_less(method, rows):
    labels = np.array(rows)
    for level, weights in enumerate(class_weights(ClassWeightsConfig(method=method), labels, TAXONOMY)):
        known = labels[labels[:, level] >= 0, level]
        if len(known):
            assert weights[torch.from_numpy(known)].mean().item() == pytest.approx(1.0, rel=1e-5)
        counts = np.bincount(known, minlength=len(weights))
        seen = np.flatnonzero(counts)
        by_count = weights.numpy()[seen[np.argsort(counts[seen])]]
        assert (np.diff(by_count) <= 1e-6 * by_count[:-1]).all()
        assert torch.equal(weights[counts == 0], torch.ones(int((counts == 0).sum())))
