from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hiertune.config import AdamWConfig, ConstantConfig, CosineConfig, SGDConfig
from hiertune.train.optim import build_optimizer, learning_rate_factor


def factors(config, total):
    return [learning_rate_factor(config, step, total) for step in range(total)]


def test_cosine_with_warm_up():
    values = factors(CosineConfig(warmup=0.1, final=0.2), 100)
    assert values[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert (
        values[54] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * 45 / 90)) / 2) == pytest.approx(0.6)
    )
    assert values[99] == pytest.approx(0.2)


def test_cosine_without_warm_up_starts_at_the_peak():
    values = factors(CosineConfig(warmup=0.0, final=0.0), 5)
    assert values == pytest.approx([1.0, 0.5 + math.sqrt(0.5) / 2, 0.5, 0.5 - math.sqrt(0.5) / 2, 0.0])


def test_constant_stays_after_warm_up():
    assert factors(ConstantConfig(warmup=0.5), 4) == [0.5, 1.0, 1.0, 1.0]
    assert factors(ConstantConfig(), 3) == [1.0, 1.0, 1.0]


@given(
    st.sampled_from([ConstantConfig, CosineConfig]),
    st.floats(0, 1),
    st.integers(1, 50),
)
def test_rises_to_the_peak_once_then_never_again(kind, warmup, total):
    values = factors(kind(warmup=warmup), total)
    peak = values.index(1.0)
    assert all(0 < value <= 1 for value in values)
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)
    assert peak == max(round(warmup * total), 1) - 1


def train(make, steps=3):
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = make([parameter])
    for step in range(steps):
        parameter.grad = torch.full_like(parameter, 0.5 - step) + parameter.detach()
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize(
    ("config", "plain"),
    [
        (
            AdamWConfig(lr=0.1, weight_decay=0.3, betas=(0.8, 0.95)),
            lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3, betas=(0.8, 0.95)),
        ),
        (
            SGDConfig(lr=0.1, momentum=0.7, nesterov=True, weight_decay=0.2),
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.7, nesterov=True, weight_decay=0.2),
        ),
        (SGDConfig(lr=0.1, momentum=0.0), lambda p: torch.optim.SGD(p, lr=0.1)),
    ],
)
def test_fused_equals_plain(config, plain):
    torch.testing.assert_close(train(lambda p: build_optimizer(config, p)), train(plain))
