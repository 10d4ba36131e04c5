"""The closed-form gradient against autograd of the paper's loss, under torch's own Adam."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertune.config import UncertaintyConfig
from hiertune.weighting import Uncertainty

LEVELS = ("a", "b", "c")
ALL = torch.ones(3)


def weights_by_autograd(losses: torch.Tensor, lr: float) -> torch.Tensor:
    """Of the losses `[S, T]` of some steps: weights after each, by exp(-s) * L + s / 2."""
    s = torch.zeros(losses.shape[1], dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([s], lr=lr)
    seen = []
    for of_step in losses:
        adam.zero_grad()
        ((-s).exp() * of_step + s / 2).sum().backward()
        adam.step()
        seen.append((-s).exp().detach())
    return torch.stack(seen)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.lists(st.floats(0.0, 50.0), min_size=3, max_size=3), min_size=1, max_size=8),
    st.floats(1e-4, 1.0),
)
def test_weights_are_those_of_gradient_descent_on_the_paper_s_loss(losses, lr):
    losses = torch.tensor(losses, dtype=torch.float64)
    weighting = Uncertainty(UncertaintyConfig(lr=lr), LEVELS)
    for of_step, expected in zip(losses, weights_by_autograd(losses, lr), strict=True):
        weighting.after_step(of_step, ALL)
        torch.testing.assert_close(weighting.weights, expected.float())


def test_they_settle_at_half_the_inverse_of_a_steady_loss():
    weighting = Uncertainty(UncertaintyConfig(lr=0.05), LEVELS)
    losses = torch.tensor([0.1, 1.0, 4.0])
    for _ in range(400):
        weighting.after_step(losses, ALL)
    torch.testing.assert_close(weighting.weights, 1 / (2 * losses), rtol=0.01, atol=0)


def test_a_level_unknown_in_a_step_is_as_if_the_step_were_not():
    losses = torch.tensor([[1.0, 0.0, 3.0], [2.0, 5.0, 0.1], [0.3, 0.0, 7.0], [1.0, 0.4, 0.2]])
    weighting = Uncertainty(UncertaintyConfig(lr=0.1), LEVELS)
    for of_step in losses:
        weighting.after_step(of_step, (of_step > 0).float())
    seen = weights_by_autograd(losses[:, [0, 2]].double(), 0.1)[-1]
    rare = weights_by_autograd(losses[[1, 3]][:, [1]].double(), 0.1)[-1]
    torch.testing.assert_close(weighting.weights, torch.stack([seen[0], rare[0], seen[1]]).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_losses_stay_as_they_were(dtype):
    losses = torch.tensor([1.0, 2.0, 3.0], dtype=dtype)
    Uncertainty(UncertaintyConfig(), LEVELS).after_step(losses, ALL)
    assert losses.tolist() == [1.0, 2.0, 3.0]
