"""Every sampler by the same rules, on a real ledger; nothing is trained."""

import typing

import pytest

from hiertune.config import (
    ASHAConfig,
    HyperbandConfig,
    MedianConfig,
    NoSchedulerConfig,
    SamplerConfig,
    SchedulerConfig,
)
from hiertune.search.ledger import Ledger
from hiertune.search.strategies import build_sampler, build_scheduler
from hiertune.space import parse_space

SPACE = """
name: it
data: {path: data.h5}
model:
  head:
    choice:
      - {kind: linear}
      - {kind: conditional, routing: {choice: [soft, gumbel]}, temperature: {quniform: [1.0, 2.0, 0.5]}}
optimizer: {kind: adamw, lr: LR}
"""
CONTINUOUS = SPACE.replace("LR", "{loguniform: [1e-4, 1e-1]}")
FINITE = SPACE.replace("LR", "{choice: [1e-3, 1e-2]}")


def kinds(union):
    return typing.get_args(typing.get_args(union)[0])


def search(path, space, sampler, seed, trials):
    """Parameters of each trial; the objective prefers the smallest learning rate."""
    ledger = Ledger.open(path, "search", "max", resume=False)
    ledger.study.sampler = build_sampler(sampler, seed)
    taken = []
    for _ in range(trials):
        trial = ledger.next_trial()
        config = space.suggest(trial)
        assert space.resolve(trial.params) == config
        assert config.model.head.kind in ("linear", "conditional")
        taken.append(dict(trial.params))
        ledger.tell(trial, "completed", value=-config.optimizer.lr)
    return taken


@pytest.mark.parametrize("kind", kinds(SamplerConfig), ids=lambda kind: kind.__name__)
def test_a_seed_decides_every_draw(tmp_path, kind):
    space = parse_space(FINITE if kind().kind == "grid" else CONTINUOUS)
    runs = [search(tmp_path / f"{i}.log", space, kind(), seed, 14) for i, seed in enumerate([1, 1, 2])]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert {params["model.head"] for params in runs[0]} == {"linear", "conditional"}


def test_a_grid_tries_every_combination_once(tmp_path):
    space = parse_space(FINITE)
    size = space.size()
    assert size == 2 * (1 + 2 * 3)
    taken = search(tmp_path / "ledger.log", space, kinds(SamplerConfig)[2](), 0, size)
    assert len({tuple(sorted(params.items())) for params in taken}) == size


@pytest.mark.parametrize(
    ("config", "name", "settings"),
    [
        (NoSchedulerConfig(), "FIFOScheduler", {}),
        (ASHAConfig(grace_epochs=3), "AsyncHyperBandScheduler", {"_max_t": 9, "_reduction_factor": 3.0}),
        (
            MedianConfig(grace_epochs=3),
            "MedianStoppingRule",
            {"_grace_period": 3, "_min_samples_required": 3},
        ),
        (HyperbandConfig(), "FIFOScheduler", {}),
    ],
)
def test_schedulers_count_in_epochs(config, name, settings):
    scheduler = build_scheduler(config, epochs=9)
    assert name in [kind.__name__ for kind in type(scheduler).__mro__]
    for attribute, value in settings.items():
        assert getattr(scheduler, attribute) == value


def test_every_scheduler_is_tested():
    assert {kind.__name__ for kind in kinds(SchedulerConfig)} == {
        "NoSchedulerConfig",
        "ASHAConfig",
        "MedianConfig",
        "HyperbandConfig",
    }
