"""What every weighting must do. A new kind is one more line in `CONFIGS`."""

from __future__ import annotations

import io
import math
import typing

import pytest
import torch

from hiertune import Taxonomy
from hiertune.config import (
    EqualConfig,
    FixedConfig,
    GradNormConfig,
    HierarchicalSoftmaxConfig,
    MLPConfig,
    ModelConfig,
    WeightingConfig,
)
from hiertune.gradnorm import Weighting, build_weighting
from hiertune.losses import CrossEntropy, level_losses
from hiertune.models import build_model

CONFIGS = [
    EqualConfig(),
    FixedConfig(weights={"b": 1.0, "c": 3.0}),
    GradNormConfig(interval=3),
    GradNormConfig(interval=1, at="last_layer", lr=1.0, alpha=0.0),
    GradNormConfig(interval=1, linear_heads=False, lr=1.0, alpha=3.0),
]
TAXONOMY = Taxonomy.from_parents(["a", "b", "c"], [[-1, -1], [0, 1, 1], [0, 0, 1, 2, 2, -1]])
LABELS = torch.tensor([[0, 0, 0], [1, 1, -1], [1, 2, 4], [-1, -1, 5], [0, -1, -1]])


@pytest.fixture(params=CONFIGS, ids=lambda config: f"{config.kind}-{CONFIGS.index(config)}")
def config(request) -> WeightingConfig:
    return request.param


@pytest.fixture
def weighting(config) -> Weighting:
    return build_weighting(config, TAXONOMY.levels)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = ModelConfig(backbone=MLPConfig(hidden=[6, 5]), head=HierarchicalSoftmaxConfig())
    return build_model(config, TAXONOMY, (4,), None)


def update(weighting: Weighting, model, seed: int = 0, labels=LABELS) -> torch.Tensor:
    """One forward and an update; the weighted sum of the losses."""
    counts = (labels >= 0).sum(0).float()

    def reduced(logits):
        return level_losses([CrossEntropy()] * 3, logits, labels, counts, [None] * 3)

    inputs = torch.randn(len(labels), 4, generator=torch.Generator().manual_seed(seed))
    losses = reduced(model(inputs))
    weighting.update(model, losses, counts, lambda: reduced(model.base_logits))
    return torch.stack(losses) @ weighting.weights


def check_weights(weighting: Weighting) -> None:
    assert weighting.weights.shape == (3,)
    assert weighting.weights.dtype == torch.float32
    assert not weighting.weights.requires_grad
    assert (weighting.weights >= 0).all()
    torch.testing.assert_close(weighting.weights.sum(), torch.tensor(3.0))


def test_every_kind_is_tested():
    kinds = typing.get_args(typing.get_args(WeightingConfig)[0])
    assert {type(config) for config in CONFIGS} == set(kinds)


def test_weights_sum_to_the_number_of_levels_before_and_after_updates(weighting, model):
    check_weights(weighting)
    for seed in range(3):
        update(weighting, model, seed)
        check_weights(weighting)


def test_it_says_when_it_wants_an_update(config, weighting):
    wanted = [weighting.wants_update(step) for step in range(7)]
    if isinstance(config, GradNormConfig):
        assert wanted == [step % config.interval == 0 for step in range(7)]
    else:
        assert not any(wanted)


def test_only_learned_weights_move(config, weighting, model):
    before = weighting.weights.clone()
    update(weighting, model)
    assert torch.equal(weighting.weights, before) != isinstance(config, GradNormConfig)


def test_weights_that_were_read_before_an_update_stay_as_they_were(weighting, model):
    read = weighting.weights
    before = read.clone()
    update(weighting, model)
    assert torch.equal(read, before)


def test_pending_gradients_stay_bit_identical(weighting, model):
    update(weighting, model, seed=1).backward()
    pending = [p.grad.clone() for p in model.parameters()]
    update(weighting, model, seed=2)
    assert all(torch.equal(grad, p.grad) for grad, p in zip(pending, model.parameters(), strict=True))


def test_the_losses_can_still_be_trained_after_an_update(weighting, model):
    update(weighting, model).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.last_shared_weight.grad.abs().sum() > 0


def test_a_batch_without_labels_changes_nothing(weighting, model):
    update(weighting, model)
    before = weighting.weights
    update(weighting, model, labels=torch.full_like(LABELS, -1))
    torch.testing.assert_close(weighting.weights, before)


def test_report_names_every_weight_and_is_finite(weighting, model):
    for _ in range(2):
        report = weighting.report()
        assert all(math.isfinite(value) for value in report.values())
        for level, weight in zip(TAXONOMY.levels, weighting.weights.tolist(), strict=True):
            assert report[f"weight/{level}"] == weight
        update(weighting, model)


def test_the_state_survives_a_checkpoint_bit_by_bit(config, weighting, model):
    update(weighting, model)
    file = io.BytesIO()
    torch.save(weighting.state_dict(), file)
    file.seek(0)
    other = build_weighting(config, TAXONOMY.levels)
    other.load_state_dict(torch.load(file, weights_only=True))
    for seed in (1, 2):
        assert torch.equal(weighting.weights, other.weights)
        assert weighting.report() == other.report()
        update(weighting, model, seed)
        update(other, model, seed)
    assert torch.equal(weighting.weights, other.weights)
