"""Backbones against the same layers applied by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hiertune.config import IdentityConfig, MLPConfig
from hiertune.models import MLP, Identity

ROWS, WIDTH = 8, 5


def inputs() -> torch.Tensor:
    return 3 + 2 * torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


def statistics() -> tuple[torch.Tensor, torch.Tensor]:
    x = inputs()
    return x.mean(0), x.std(0)


def mlp(statistics=None, **settings) -> MLP:
    torch.manual_seed(0)
    return MLP(WIDTH, MLPConfig(**{"standardize": False, "hidden": [6, 4]} | settings), statistics)


ACTIVATIONS = {
    "relu": lambda x: x.clamp_min(0),
    "gelu": lambda x: x * torch.special.ndtr(x),
    "silu": lambda x: x * torch.sigmoid(x),
    "tanh": torch.tanh,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
def test_mlp_is_linear_norm_activation_per_width(activation, norm):
    model = mlp(activation=activation, norm=norm)
    first, second = (layer for layer in model.modules() if isinstance(layer, nn.Linear))
    x = inputs()
    for linear in (first, second):
        x = x @ linear.weight.T + linear.bias
        if norm != "none":
            over = 1 if norm == "layer" else 0
            x = (x - x.mean(over, keepdim=True)) / (x.var(over, unbiased=False, keepdim=True) + 1e-5).sqrt()
        x = ACTIVATIONS[activation](x)
    torch.testing.assert_close(model(inputs()), x, rtol=1e-4, atol=1e-5)
    assert (first.out_features, second.out_features, model.out_features) == (6, 4, 4)
    assert model.last_shared_weight is second.weight


def test_features_are_scaled_to_their_length():
    model = mlp(feature_length=16.0).eval()
    plain = mlp().eval()(inputs())
    expected = 16.0 * plain / plain.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(model(inputs()), expected)


def test_standardised_inputs_have_mean_0_and_deviation_1():
    features = Identity(WIDTH, IdentityConfig(), statistics())(inputs())
    torch.testing.assert_close(features.mean(0), torch.zeros(WIDTH), rtol=0, atol=1e-6)
    torch.testing.assert_close(features.std(0), torch.ones(WIDTH))


def test_an_input_that_never_varies_is_only_shifted():
    mean, std = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])
    model = Identity(2, IdentityConfig(), (mean, std))
    assert model(torch.tensor([[1.5, 10.0]])).tolist() == [[0.5, 2.0]]


@pytest.mark.parametrize("kind", ["mlp", "identity"])
def test_statistics_are_read_only_if_asked_for_and_travel_in_the_state_dict(kind):
    def make(standardize, statistics):
        if kind == "mlp":
            return mlp(statistics, standardize=standardize)
        return Identity(WIDTH, IdentityConfig(standardize=standardize), statistics)

    plain, standardised, empty = make(False, statistics()), make(True, statistics()), make(True, None)
    assert not any("mean" in key for key in plain.state_dict())
    assert torch.equal(plain(inputs()), empty(inputs()))
    assert not torch.equal(plain(inputs()), standardised(inputs()))
    empty.load_state_dict(standardised.state_dict())
    assert torch.equal(empty(inputs()), standardised(inputs()))


def test_statistics_are_copied():
    mean, std = statistics()
    model = Identity(WIDTH, IdentityConfig(), (mean, std))
    before = model(inputs())
    mean.add_(1)
    std.add_(1)
    assert torch.equal(model(inputs()), before)


def test_identity_has_no_parameters_and_keeps_the_inputs():
    model = Identity(WIDTH, IdentityConfig(standardize=False))
    assert torch.equal(model(inputs()), inputs())
    assert list(model.parameters()) == []
    assert model.last_shared_weight is None
    assert model.out_features == WIDTH


@pytest.mark.parametrize(
    "model",
    [
        mlp(hidden=[64], dropout=0.5, activation="silu"),
        mlp(hidden=[64], input_dropout=0.5, activation="silu"),
        Identity(WIDTH, IdentityConfig(dropout=0.5, standardize=False)),
    ],
    ids=["dropout", "input_dropout", "identity"],
)
def test_dropout_acts_in_training_only(model):
    model.train()
    torch.manual_seed(0)
    first, second = model(inputs()), model(inputs())
    assert not torch.equal(first, second)
    assert torch.equal(model.eval()(inputs()), model(inputs()))


def test_dropout_is_after_every_hidden_layer_and_input_dropout_on_the_inputs():
    wide = mlp(hidden=[400, 300], dropout=0.25, norm="layer")
    kinds = [type(layer).__name__ for layer in wide.layers]
    assert kinds == ["Linear", "LayerNorm", "ReLU", "Dropout"] * 2
    identity = Identity(10_000, IdentityConfig(dropout=0.25, standardize=False)).train()
    torch.manual_seed(0)
    dropped = identity(torch.ones(1, 10_000))
    assert abs((dropped == 0).float().mean() - 0.25) < 0.02
    torch.testing.assert_close(dropped.max().item(), 1 / 0.75)


def test_without_dropout_no_random_number_is_drawn():
    model = mlp(norm="batch").train()
    state = torch.get_rng_state()
    model(inputs())
    assert torch.equal(torch.get_rng_state(), state)


def test_images_are_flattened_in_their_own_units():
    images = torch.arange(24, dtype=torch.uint8).reshape(2, 2, 2, 3)
    features = Identity(12, IdentityConfig(standardize=False))(images)
    assert torch.equal(features, torch.arange(24.0).reshape(2, 12))
