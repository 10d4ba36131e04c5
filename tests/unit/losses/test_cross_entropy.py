"""Smoothed cross-entropy against a matrix of targets, written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hiertune.errors import InputError
from hiertune.losses import CrossEntropy


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def definition(classes: int, smoothing: float) -> torch.Tensor:
    rows = torch.eye(classes, dtype=torch.float64)
    if classes > 1:
        rows = torch.full((classes, classes), smoothing / (classes - 1), dtype=torch.float64)
        rows.fill_diagonal_(1 - smoothing)
    return rows


@pytest.mark.parametrize("classes", [1, 2, 5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_values_and_gradients(classes, smoothing):
    loss, rows = CrossEntropy(smoothing), definition(classes, smoothing)
    logits = 4 * torch.randn(8, classes, dtype=torch.float64)
    targets = torch.arange(8) % classes
    mixtures = torch.rand(8, classes, dtype=torch.float64).softmax(1)
    for given, target_rows in ((targets, rows[targets]), (mixtures, mixtures @ rows)):
        ours, dense = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        value = loss(ours, given)
        expected = -(target_rows * torch.log_softmax(dense, 1)).sum(1)
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
        (value * torch.arange(8)).sum().backward()
        (expected * torch.arange(8)).sum().backward()
        torch.testing.assert_close(ours.grad, dense.grad, rtol=0, atol=1e-12)


def test_without_smoothing_it_is_plain_cross_entropy():
    logits, targets = torch.randn(8, 5), torch.arange(8) % 5
    expected = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(CrossEntropy()(logits, targets), expected)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_smoothing_out_of_range(smoothing):
    with pytest.raises(InputError, match="0 <= smoothing < 1"):
        CrossEntropy(smoothing)
