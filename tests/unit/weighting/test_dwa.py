"""Dynamic weight average against its formula, level by level."""

import math

import pytest
import torch

from hiertune.config import DWAConfig
from hiertune.weighting import DWA

LEVELS = ("a", "b", "c")


def paper(losses: list[list[float]], temperature: float) -> list[float]:
    """Weights of the epoch that follows those with these mean losses."""
    if len(losses) < 2:
        return [1.0] * 3
    exponents = [math.exp(now / before / temperature) for before, now in zip(*losses[-2:], strict=True)]
    return [3 * exponent / sum(exponents) for exponent in exponents]


@pytest.mark.parametrize("temperature", [0.5, 2.0, 50.0])
def test_weights_follow_the_ratios_of_the_last_two_epochs(temperature):
    weighting = DWA(DWAConfig(temperature=temperature), LEVELS)
    epochs = [[3.0, 2.0, 1.0], [1.5, 1.9, 1.1], [1.4, 1.0, 0.2], [0.9, 0.8, 0.3]]
    for done in range(len(epochs) + 1):
        assert weighting.weights.tolist() == pytest.approx(paper(epochs[:done], temperature), rel=1e-6)
        if done < len(epochs):
            weighting.after_epoch(torch.tensor(epochs[done]))


def test_slow_levels_gain_weight_and_heat_evens_it_out():
    weights = {}
    for temperature in (0.5, 5.0):
        weighting = DWA(DWAConfig(temperature=temperature), LEVELS)
        for losses in ([1.0, 1.0, 1.0], [0.1, 0.5, 0.9]):
            weighting.after_epoch(torch.tensor(losses))
        weights[temperature] = weighting.weights.tolist()
        assert weights[temperature] == sorted(weights[temperature])
    assert weights[0.5][2] > weights[5.0][2] > 1.0


def test_a_level_without_a_loss_counts_as_steady():
    """The second is never known before the last epoch, the third not in the one before that."""
    weighting = DWA(DWAConfig(), LEVELS)
    for losses in ([1.0, 0.0, 1.0], [0.5, 0.0, 0.0], [0.25, 1.0, 1.0]):
        weighting.after_epoch(torch.tensor(losses))
        if losses[0] < 1:
            expected = 3 * torch.tensor([0.5 / 2, 1 / 2, 1 / 2]).softmax(0)
            torch.testing.assert_close(weighting.weights, expected)
