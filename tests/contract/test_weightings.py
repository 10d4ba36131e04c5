"""What every weighting must do. A new kind is one more line in `CONFIGS`.

Run as a script, this file is one rank of the test with two: `test_weightings.py RANK WORLD FOLDER`.
"""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hiertune import Taxonomy
from hiertune.config import (
    DWAConfig,
    EqualConfig,
    ExcludeConfig,
    FixedConfig,
    GradNormConfig,
    HierarchicalSoftmaxConfig,
    MLPConfig,
    ModelConfig,
    UncertaintyConfig,
    WeightingConfig,
)
from hiertune.losses import CrossEntropy, level_losses
from hiertune.models import build_model
from hiertune.weighting import Weighting, build_weighting

CONFIGS = [
    EqualConfig(),
    FixedConfig(weights={"b": 1.0, "c": 3.0}),
    GradNormConfig(interval=3),
    GradNormConfig(interval=1, warmup_steps=2, initial_weights="inverse_density"),
    GradNormConfig(interval=1, linear_heads=False, lr=1.0, alpha=3.0),
    GradNormConfig(interval=1, at="last_layer", lr=1.0, alpha=0.0),
    GradNormConfig(interval=1, at="last_layer", exclude=ExcludeConfig(names=["3"]), accumulate=True),
    GradNormConfig(interval=1, at="backbone", lr=0.5),
    GradNormConfig(interval=2, at="backbone", linear_heads=False, exclude=ExcludeConfig(patterns=["bias"])),
    GradNormConfig(interval=1, accumulate=True, initial_weights="class_complexity"),
    GradNormConfig(interval=1, at="backbone", accumulate=True),
    UncertaintyConfig(lr=0.1),
    DWAConfig(),
    DWAConfig(temperature=0.3),
]
NAMES = [f"{config.kind}-{position}" for position, config in enumerate(CONFIGS)]
TAXONOMY = Taxonomy.from_parents(["a", "b", "c"], [[-1, -1], [0, 1, 1], [0, 0, 1, 2, 2, -1]])
LABELS = torch.tensor([[0, 0, 0], [1, 1, -1], [1, 2, 4], [-1, -1, 5], [0, -1, -1]])
PER_EPOCH = 2
"""Steps of an epoch."""


def sums_to_three(config: WeightingConfig) -> bool:
    return not isinstance(config, UncertaintyConfig)


def learns(config: WeightingConfig) -> bool:
    return not isinstance(config, EqualConfig | FixedConfig)


def make_model():
    torch.manual_seed(0)
    config = ModelConfig(backbone=MLPConfig(hidden=[6, 5]), head=HierarchicalSoftmaxConfig())
    return build_model(config, TAXONOMY, (4,), None)


def make_weighting(config: WeightingConfig, model) -> Weighting:
    return build_weighting(config, TAXONOMY, LABELS.numpy(), model.backbone)


@pytest.fixture(params=CONFIGS, ids=NAMES)
def config(request) -> WeightingConfig:
    return request.param


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def weighting(config, model) -> Weighting:
    return make_weighting(config, model)


def train_step(weighting, model, number: int, labels=LABELS, passes=None, rows=None, backward=True):
    """What the training loop does in step `number` (from 0): every hook in its place, SGD in the end.

    `passes` are the rows of each forward pass (all at once by default), of which this rank has those in
    `rows`. Gives the step's losses of this rank `[T]`.
    """
    inputs = torch.randn(len(labels), 4, generator=torch.Generator().manual_seed(number))
    passes = passes or [range(len(labels))]
    rows = range(len(labels)) if rows is None else rows
    weights = weighting.weights
    wants_update = weighting.wants_update(number)

    def reduced(logits, mine, counts):
        return level_losses([CrossEntropy()] * 3, logits, labels[mine], counts, [None] * 3)

    counts = (labels >= 0).sum(0).float()
    total = torch.zeros(3)
    for position, of_pass in enumerate(passes):
        mine = [row for row in of_pass if row in rows]
        last = position == len(passes) - 1
        losses = reduced(model(inputs[mine]), mine, counts)
        if wants_update and (last or weighting.whole_step):
            of_batch = counts if weighting.whole_step else (labels[list(of_pass)] >= 0).sum(0).float()
            shares = counts / of_batch.clamp(min=1)
            measured = [loss * share for loss, share in zip(losses, shares, strict=True)]

            def base_losses(mine=mine, of_batch=of_batch):
                return reduced(model.base_logits, mine, of_batch)

            weighting.update(model, measured, of_batch, base_losses, last)
        stacked = torch.stack(losses)
        if backward:
            (stacked @ weights).backward()
        total += stacked.detach()
    weighting.after_step(total, counts)
    if number % PER_EPOCH == PER_EPOCH - 1:
        everywhere = total.clone()
        if dist.is_initialized():
            dist.all_reduce(everywhere)
        weighting.after_epoch(everywhere)
    return total


def sgd(model) -> None:
    for parameter in model.parameters():
        if dist.is_initialized():
            dist.all_reduce(parameter.grad)
        parameter.data -= 0.2 * parameter.grad
    model.zero_grad(set_to_none=False)


def check_weights(config: WeightingConfig, weighting: Weighting) -> None:
    assert weighting.weights.shape == (3,)
    assert weighting.weights.dtype == torch.float32
    assert not weighting.weights.requires_grad
    assert weighting.weights.isfinite().all()
    if isinstance(config, FixedConfig):
        assert weighting.weights.tolist() == [0.0, 0.75, 2.25]
    else:
        assert (weighting.weights > 0).all()
    if sums_to_three(config):
        torch.testing.assert_close(weighting.weights.sum(), torch.tensor(3.0))


def test_every_kind_is_tested():
    kinds = typing.get_args(typing.get_args(WeightingConfig)[0])
    assert {type(config) for config in CONFIGS} == set(kinds)


def test_every_choice_of_gradnorm_is_tested():
    gradnorms = [config for config in CONFIGS if isinstance(config, GradNormConfig)]
    for name in ("at", "initial_weights"):
        choices = typing.get_args(GradNormConfig.model_fields[name].annotation)
        assert {getattr(config, name) for config in gradnorms} == set(choices)
    for name in ("accumulate", "linear_heads"):
        assert {getattr(config, name) for config in gradnorms} == {False, True}


def test_weights_are_sound_from_the_first_step_on(config, weighting, model):
    check_weights(config, weighting)
    for number in range(6):
        train_step(weighting, model, number)
        sgd(model)
        check_weights(config, weighting)


def test_it_says_when_it_wants_an_update(config, weighting):
    wanted = [weighting.wants_update(step) for step in range(7)]
    if isinstance(config, GradNormConfig):
        warmup = config.warmup_steps
        assert wanted == [s >= warmup and (s - warmup) % config.interval == 0 for s in range(7)]
    else:
        assert not any(wanted)


def test_only_learned_weights_move(config, weighting, model):
    before = weighting.weights.clone()
    for number in range(2 * PER_EPOCH):
        train_step(weighting, model, number)
        sgd(model)
    assert torch.equal(weighting.weights, before) != learns(config)


def test_weights_that_were_read_before_stay_as_they_were(weighting, model):
    read = weighting.weights
    before = read.clone()
    for number in range(2 * PER_EPOCH):
        train_step(weighting, model, number)
    assert torch.equal(read, before)


def test_pending_gradients_stay_bit_identical(weighting, model):
    train_step(weighting, model, 0)
    pending = [p.grad.clone() for p in model.parameters()]
    for number in (2, 3):
        train_step(weighting, model, number, backward=False)
    assert all(torch.equal(grad, p.grad) for grad, p in zip(pending, model.parameters(), strict=True))


def test_the_losses_can_still_be_trained_after_an_update(weighting, model):
    train_step(weighting, model, 6)
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.last_shared_weight.grad.abs().sum() > 0


def test_steps_without_labels_change_nothing(config, weighting, model):
    for number in range(PER_EPOCH):
        train_step(weighting, model, number)
    before = weighting.weights
    train_step(weighting, model, 6, labels=torch.full_like(LABELS, -1))
    torch.testing.assert_close(weighting.weights, before)


def test_a_level_that_is_never_known_keeps_its_weight(config, weighting, model):
    labels = LABELS.clone()
    labels[:, 1] = -1
    before = weighting.weights[1].clone()
    for number in range(3 * PER_EPOCH):
        train_step(weighting, model, number, labels)
        sgd(model)
        check_weights(config, weighting)
    if not isinstance(config, DWAConfig):  # there only ratios between weights mean something
        torch.testing.assert_close(weighting.weights[1], before)


def test_report_names_every_weight_and_is_finite(weighting, model):
    for number in range(3):
        report = weighting.report()
        assert all(math.isfinite(value) for value in report.values())
        for level, weight in zip(TAXONOMY.levels, weighting.weights.tolist(), strict=True):
            assert report[f"weight/{level}"] == weight
        train_step(weighting, model, number)


@pytest.mark.parametrize("done", [1, 2, 3])
def test_the_state_survives_a_checkpoint_bit_by_bit(config, weighting, model, done):
    for number in range(done):
        train_step(weighting, model, number)
    file = io.BytesIO()
    torch.save(weighting.state_dict(), file)
    file.seek(0)
    other = make_weighting(config, model)
    other.load_state_dict(torch.load(file, weights_only=True))
    for number in range(done, done + 4):
        assert torch.equal(weighting.weights, other.weights)
        assert weighting.report() == other.report()
        train_step(weighting, model, number)
        train_step(other, model, number)
    assert torch.equal(weighting.weights, other.weights)


# ------------------------------------------------------------------------------------ two ranks

SPLITS = (2, 4, 5, 0, 1, 3)
"""How many rows the first rank has in each step; the second has the others."""
PASSES = [[0, 3], [1, 4], [2]]


def history(config: WeightingConfig, rank: int, world: int, passes=None) -> torch.Tensor:
    """The weights after every step, as `rank` sees them, and the model's parameters at the end."""
    model = make_model()
    weighting = make_weighting(config, model)
    seen = []
    for number, split in enumerate(SPLITS):
        labels = LABELS.clone()
        if number == 0:
            labels[:, 1] = -1  # unknown everywhere
        if number == 1:
            labels[1:, 0] = -1  # known on one rank only
        halves = (range(split), range(split, len(LABELS)))
        train_step(weighting, model, number, labels, passes, halves[rank] if world > 1 else None)
        sgd(model)
        seen.append(weighting.weights)
    parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
    return torch.cat([*seen, parameters])


def histories(rank: int, world: int) -> list[torch.Tensor]:
    return [history(config, rank, world, PASSES) for config in CONFIGS]


def main(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(histories(rank, world), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_two_ranks_with_different_rows_equal_one_process_with_all(tmp_path):
    environment = os.environ | {
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), "2", str(tmp_path)], env=environment)
        for rank in range(2)
    ]
    alone = histories(0, 1)
    assert [process.wait(120) for process in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for ours, theirs, expected in zip(first, second, alone, strict=True):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=1e-6)


SPLITTABLE = [c for c in CONFIGS if not isinstance(c, GradNormConfig) or c.accumulate]


@pytest.mark.parametrize("config", SPLITTABLE, ids=lambda config: f"{config.kind}-{CONFIGS.index(config)}")
def test_how_a_step_is_cut_into_passes_changes_nothing(config):
    """But for GradNorm that measures the last pass alone."""
    torch.testing.assert_close(history(config, 0, 1, PASSES), history(config, 0, 1), rtol=2e-5, atol=1e-6)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
