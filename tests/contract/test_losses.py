"""What every per-level loss must do. A new kind of loss is one more line in `CONFIGS`."""

from __future__ import annotations

import typing

import numpy as np
import pytest
import torch

from hiertune import Taxonomy
from hiertune.config import CrossEntropyConfig, LevelSmoothingConfig, LossConfig, TaxonomySmoothingConfig
from hiertune.losses import build_losses, level_losses

CONFIGS = [
    CrossEntropyConfig(),
    CrossEntropyConfig(smoothing=0.2),
    TaxonomySmoothingConfig(alpha=0.0),
    TaxonomySmoothingConfig(alpha=0.3, beta=0.5),
    TaxonomySmoothingConfig(alpha=0.3, beta=80.0, uniform_roots=False, fallback_to_uniform=False),
    TaxonomySmoothingConfig(alpha=0.3, clade_share=0.6, levels={"leaf": LevelSmoothingConfig(alpha=0.5)}),
    TaxonomySmoothingConfig(levels={"leaf": LevelSmoothingConfig(enabled=False)}),
]
TAXONOMY = Taxonomy.from_parents(
    ["top", "mid", "leaf"], [[-1], [0, 0, -1], [0, 0, 1, 2, 2, 2, -1]]
)  # one class at the top, orphans below
CLASSES = TAXONOMY.num_classes[2]
TARGETS = torch.tensor([0, 6, 3, 3, 5, 1, 2, 4])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=CONFIGS, ids=lambda config: f"{config.kind}-{CONFIGS.index(config)}")
def config(request) -> LossConfig:
    return request.param


@pytest.fixture
def loss(config) -> torch.nn.Module:
    return build_losses(config, TAXONOMY)[2]


@pytest.fixture
def logits() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(8, CLASSES, generator=generator, dtype=torch.float64)).requires_grad_()


def gradient(loss, logits, targets) -> torch.Tensor:
    return torch.autograd.grad(loss(logits, targets).sum(), logits)[0]


def test_every_kind_is_tested():
    kinds = typing.get_args(typing.get_args(LossConfig)[0])
    assert {type(config) for config in CONFIGS} == set(kinds)


def test_one_finite_non_negative_loss_per_row_at_every_level(config):
    built = build_losses(config, TAXONOMY)
    assert len(built) == TAXONOMY.num_levels
    for of_level, size in zip(built, TAXONOMY.num_classes, strict=True):
        value = of_level(torch.randn(8, size), torch.arange(8) % size)
        assert value.shape == (8,)
        assert value.dtype == torch.float32
        assert torch.isfinite(value).all()
        assert (value >= 0).all()


def test_a_level_of_one_class_has_nothing_to_learn(config):
    logits = torch.randn(3, 1, requires_grad=True)
    value = build_losses(config, TAXONOMY)[0](logits, torch.zeros(3, dtype=torch.long))
    assert torch.equal(value, torch.zeros(3))
    assert torch.equal(torch.autograd.grad(value.sum(), logits)[0], torch.zeros(3, 1))


def test_gradients(loss, logits):
    assert torch.autograd.gradcheck(lambda z: loss(z, TARGETS), logits)
    soft = torch.rand(8, CLASSES, dtype=torch.float64).softmax(1)
    assert torch.autograd.gradcheck(lambda z: loss(z, soft), logits)


def test_backward_twice_through_one_forward(loss, logits):
    value = loss(logits, TARGETS)
    upstream = torch.arange(8, dtype=torch.float64)
    first = torch.autograd.grad(value, logits, upstream, retain_graph=True)[0]
    second = torch.autograd.grad(value, logits, 2 * upstream, retain_graph=True)[0]
    third = torch.autograd.grad(value, logits, upstream)[0]
    torch.testing.assert_close(second, 2 * first)
    assert torch.equal(third, first)


def test_rows_do_not_touch_each_other(loss, logits):
    order = torch.tensor([3, 0, 7, 5])
    torch.testing.assert_close(loss(logits[order], TARGETS[order]), loss(logits, TARGETS)[order])
    (of_one,) = torch.autograd.grad(loss(logits, TARGETS)[3], logits)
    assert torch.equal(of_one.abs().sum(1) > 0, torch.arange(8) == 3)


def test_a_one_hot_target_equals_its_class(loss, logits):
    one_hot = torch.nn.functional.one_hot(TARGETS, CLASSES).double()
    torch.testing.assert_close(loss(logits, one_hot), loss(logits, TARGETS))
    torch.testing.assert_close(gradient(loss, logits, one_hot), gradient(loss, logits, TARGETS))


def test_a_mixed_target_mixes_the_losses(loss, logits):
    one_hot = torch.nn.functional.one_hot(TARGETS, CLASSES).double()
    mixed = 0.3 * one_hot + 0.7 * one_hot.flip(0)
    expected = 0.3 * loss(logits, TARGETS) + 0.7 * loss(logits, TARGETS.flip(0))
    torch.testing.assert_close(loss(logits, mixed), expected)


def test_the_numbering_of_classes_does_not_matter(config, loss, logits):
    order = np.random.default_rng(0).permutation(CLASSES)
    renumbered = Taxonomy.from_parents(TAXONOMY.levels, [*TAXONOMY.parents[:2], TAXONOMY.parents[2][order]])
    new_number = torch.from_numpy(np.argsort(order))
    again = build_losses(config, renumbered)[2]
    torch.testing.assert_close(again(logits[:, order], new_number[TARGETS]), loss(logits, TARGETS))


def test_only_differences_of_logits_count(loss, logits):
    torch.testing.assert_close(loss(logits + 7.0, TARGETS), loss(logits, TARGETS))
    torch.testing.assert_close(
        gradient(loss, logits, TARGETS).sum(1), torch.zeros(8, dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_give_a_float32_loss(loss, logits, dtype):
    half = (1e3 * logits.detach()).to(dtype).requires_grad_()
    value = loss(half, TARGETS)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(half.detach().float(), TARGETS))
    of_half = gradient(loss, half, TARGETS)
    assert of_half.dtype == dtype
    assert torch.isfinite(of_half).all()


def test_extreme_logits_stay_finite(loss):
    logits = torch.zeros(2, CLASSES, requires_grad=True)
    with torch.no_grad():
        logits[0, 1], logits[1, 1] = 1e4, -1e4
    targets = torch.tensor([0, 1])
    assert torch.isfinite(loss(logits, targets)).all()
    assert torch.isfinite(gradient(loss, logits, targets)).all()


def test_an_empty_batch(loss):
    logits = torch.zeros(0, CLASSES, requires_grad=True)
    value = loss(logits, torch.zeros(0, dtype=torch.long))
    assert value.shape == (0,)
    assert gradient(loss, logits, torch.zeros(0, dtype=torch.long)).shape == (0, CLASSES)


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_a_label_out_of_range_is_an_error(loss, logits, label):
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
        loss(logits, torch.full((8,), label))


def test_inputs_are_left_alone(loss, logits):
    before = logits.detach().clone()
    soft = torch.rand(8, CLASSES).softmax(1).double()
    kept = soft.clone()
    gradient(loss, logits, soft)
    assert torch.equal(logits.detach(), before)
    assert torch.equal(soft, kept)


def test_nothing_is_saved_in_checkpoints(loss):
    assert dict(loss.state_dict()) == {}


def test_the_reducer_masks_unknown_labels(config):
    labels = torch.tensor([[0, 0, 1], [-1, 1, -1], [0, -1, 6], [-1, -1, -1]])
    logits = {
        level: torch.randn(4, size, requires_grad=True)
        for level, size in zip(TAXONOMY.levels, TAXONOMY.num_classes, strict=True)
    }
    built = build_losses(config, TAXONOMY)
    reduced = level_losses(built, logits, labels, (labels >= 0).sum(0).float(), [None] * 3)
    for level, of_level in enumerate(logits.values()):
        known = labels[:, level] >= 0
        expected = built[level](of_level[known], labels[known, level]).mean()
        torch.testing.assert_close(reduced[level], expected)
        (of_logits,) = torch.autograd.grad(reduced[level], of_level)
        assert torch.equal(of_logits[~known], torch.zeros_like(of_logits[~known]))
