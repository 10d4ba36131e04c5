"""Who is mixed with whom, and what comes of it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hiertune.config import (
    ConstantProbability,
    CrossEntropyConfig,
    CutmixConfig,
    LinearProbability,
    MixupConfig,
    MixupOrCutmixConfig,
    TaxonomySmoothingConfig,
)
from hiertune.data import MemoryInputs
from hiertune.losses import build_losses, level_losses
from hiertune.taxonomy import Taxonomy
from hiertune.train.batches import BatchPlan, Pass
from hiertune.train.mixing import Mix, Mixing
from hiertune.train.workers import Workers

TAXONOMY = Taxonomy.from_parents(["family", "genus"], [[-1, -1], [0, 0, 1, 1]])


def labels_of(genus):
    """Labels [N, 2] of genera; -1 is unknown at both levels, -2 at the finest only."""
    genus = np.asarray(genus)
    family = np.where(genus == -1, -1, np.where(genus == -2, 0, genus // 2))
    return np.stack([family, np.maximum(genus, -1)], 1)


def mixing(config, labels, shape=(3,)):
    return Mixing(config, TAXONOMY, labels, np.arange(len(labels)), shape)


def partners(config, labels, windows=None, seed=0):
    """The partner of every row of an epoch that is one pass."""
    windows = [np.arange(len(labels))] if windows is None else windows
    order = np.concatenate(windows)
    mix = mixing(config, labels).epoch(windows, np.random.default_rng(seed))(np.arange(len(order)), 0.0)
    found = dict(zip(order.tolist(), order.tolist(), strict=True))
    if mix is not None:
        found |= dict(zip(order[mix.positions].tolist(), mix.partners.tolist(), strict=True))
    return found


@given(st.lists(st.integers(-2, 3), min_size=1, max_size=60), st.integers(2, 5), st.integers(0, 3))
def test_partners_are_of_one_class_and_each_serves_once(genera, least, seed):
    found = partners(MixupConfig(min_group_size=least), labels_of(genera), seed=seed)
    sizes = Counter(genera)
    assert sorted(found) == sorted(found.values()) == list(range(len(genera)))
    for row, partner in found.items():
        assert genera[row] == genera[partner]
        mixed = genera[row] >= 0 and sizes[genera[row]] >= least
        assert (partner != row) == mixed


def test_partners_change_with_the_epoch_and_never_leave_their_window():
    labels = labels_of([0, 1] * 20)
    windows = [np.arange(0, 20), np.arange(20, 40)]
    of_seeds = [partners(MixupConfig(), labels, windows, seed) for seed in (0, 1)]
    assert of_seeds[0] != of_seeds[1]
    for found in of_seeds:
        assert all((row < 20) == (partner < 20) and row != partner for row, partner in found.items())


def test_the_level_and_unknown_labels_decide_who_is_mixed():
    labels = labels_of([0, 1, 0, 1, -2, -2, 2, 3])
    family = partners(MixupConfig(level="family", min_group_size=2), labels)
    assert [row for row in family if family[row] == row] == [4, 5]
    both = partners(MixupConfig(level="family", min_group_size=2, exclude_unknown=False), labels)
    assert all(both[row] != row and (both[row] < 6) == (row < 6) for row in both)
    assert {row for row in range(6) if both[row] in (4, 5)} != {4, 5}, "unknown genera mix with known ones"


def test_small_groups_are_counted_over_the_training_rows():
    """Rows of other splits do not make a group large enough."""
    labels = labels_of([0] * 8)
    config = MixupConfig(min_group_size=4)
    of_three = Mixing(config, TAXONOMY, labels, np.arange(3), (1,))
    of_four = Mixing(config, TAXONOMY, labels, np.arange(4), (1,))
    random = np.random.default_rng(0)
    assert of_three.epoch([np.arange(3)], random)(np.arange(3), 0.0) is None
    assert of_four.epoch([np.arange(4)], random)(np.arange(4), 0.0) is not None


@pytest.mark.parametrize("alpha", [0.4, 1.0, 8.0])
def test_shares_are_of_the_beta_distribution(alpha):
    ask = mixing(MixupConfig(alpha=alpha), labels_of([0] * 8)).epoch([np.arange(8)], np.random.default_rng(0))
    shares = np.array([ask(np.arange(8), 0.0).share for _ in range(4000)])
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_the_probability_is_applied_once_and_follows_the_training():
    config = MixupConfig(probability=LinearProbability(start=0.8, end=0.2))
    ask = mixing(config, labels_of([0] * 8)).epoch([np.arange(8)], np.random.default_rng(0))
    for progress, expected in ((0.0, 0.8), (0.5, 0.5), (1.0, 0.2)):
        mixed = [ask(np.arange(8), progress) is not None for _ in range(4000)]
        assert np.mean(mixed) == pytest.approx(expected, abs=0.03)
    never = MixupConfig(probability=ConstantProbability(value=0.0))
    assert partners(never, labels_of([0] * 8)) == {row: row for row in range(8)}


def test_one_of_both_by_its_share():
    config = MixupOrCutmixConfig(cutmix_share=0.3, mixup_alpha=8.0, cutmix_alpha=0.5)
    ask = mixing(config, labels_of([0] * 8), (64, 64, 3)).epoch([np.arange(8)], np.random.default_rng(0))
    mixes = [ask(np.arange(8), 0.0) for _ in range(4000)]
    assert np.mean([mix.box is not None for mix in mixes]) == pytest.approx(0.3, abs=0.03)
    blended = np.array([mix.share for mix in mixes if mix.box is None])
    assert blended.var() == pytest.approx(1 / 68, rel=0.15)


def test_boxes_hold_the_partners_share_of_the_area():
    ask = mixing(CutmixConfig(), labels_of([0] * 8), (20, 40, 3)).epoch(
        [np.arange(8)], np.random.default_rng(0)
    )
    shares = []
    for _ in range(500):
        mix = ask(np.arange(8), 0.0)
        (rows, columns), shares = mix.box, [*shares, mix.share]
        assert 0 <= rows.start <= rows.stop <= 20
        assert 0 <= columns.start <= columns.stop <= 40
        area = (rows.stop - rows.start) * (columns.stop - columns.start)
        assert mix.share == pytest.approx(1 - area / 800)
    assert 0.5 < np.mean(shares) < 0.8, "boxes at the edges lose some of their area"


def test_mixup_averages_and_cutmix_pastes():
    read = torch.arange(5 * 4 * 4, dtype=torch.float32).reshape(5, 4, 4, 1)
    own, other = read[:3], read[3:]
    mix = Mix(np.array([0, 2]), np.array([7, 8]), 0.25, 2)
    blended = mix.inputs(read)
    torch.testing.assert_close(blended[0], 0.25 * own[0] + 0.75 * other[0])
    torch.testing.assert_close(blended[1], own[1], rtol=0, atol=0)
    torch.testing.assert_close(blended[2], 0.25 * own[2] + 0.75 * other[1])
    images = read.to(torch.uint8)
    assert mix.inputs(images).dtype == torch.float32
    torch.testing.assert_close(mix.inputs(images), blended)

    box = (slice(1, 3), slice(0, 2))
    pasted = Mix(np.array([2]), np.array([7]), 0.75, 2, box).inputs(images[:4])
    assert pasted.dtype == torch.uint8
    expected = images[:3].clone()
    expected[2, 1:3, 0:2] = images[3, 1:3, 0:2]
    assert torch.equal(pasted, expected)


def test_workers_share_a_mixed_pass():
    whole = Pass(
        np.array([4, 9, 2, 7, 5]),
        Mix(np.array([0, 3, 4]), np.array([9, 2, 4]), 0.3, 1),
        np.arange(16).reshape(8, 2) % 3 == 0,
    )
    shards = [whole.shard(Workers(rank, 2)) for rank in (0, 1)]
    assert [shard.rows.tolist() for shard in shards] == [[4, 9], [2, 7, 5]]
    assert [shard.mix.positions.tolist() for shard in shards] == [[0], [1, 2]]
    assert [shard.mix.partners.tolist() for shard in shards] == [[9], [2, 4]]
    hidden = whole.hidden.tolist()
    assert shards[0].hidden.tolist() == [hidden[0], hidden[1], hidden[5]]
    assert shards[1].hidden.tolist() == [hidden[2], hidden[3], hidden[4], hidden[6], hidden[7]]
    labels = np.arange(20).reshape(10, 2) % 5 - 1
    np.testing.assert_allclose(sum(shard.known(labels) for shard in shards), whole.known(labels))


SMOOTHED = TaxonomySmoothingConfig(alpha=0.3, beta=0.7)


@pytest.mark.parametrize("config", [CrossEntropyConfig(smoothing=0.2), SMOOTHED], ids=lambda c: c.kind)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_mixed_target_is_the_mixture_of_both(config, weighted):
    """Against explicit distributions over the classes, mixed row by row; so are counts and gradients."""
    torch.manual_seed(0)
    own = torch.tensor([[0, 1], [1, 2], [1, -1], [0, 0]])
    other = torch.tensor([[1, 3], [0, -1]])  # of rows 0 and 3
    mix = Mix(np.array([0, 3]), np.array([0, 0]), 0.7, 1)
    labels, mixed = mix.labels(torch.cat([own, other]))
    data = torch.cat([own, other]).numpy()
    counts = torch.from_numpy(Pass(np.arange(4), Mix(mix.positions, np.array([4, 5]), 0.7, 1)).known(data))
    assert counts.tolist() == pytest.approx([4, 0.7 + 0.3 + 1 + 0.7])

    losses = build_losses(config, TAXONOMY).double()
    weights = [torch.tensor([1.0, 2.0]).double(), torch.tensor([1.0, 0.5, 2.0, 3.0]).double()]
    weights = weights if weighted else [None, None]
    logits = {
        level: torch.randn(4, size, dtype=torch.float64, requires_grad=True)
        for level, size in zip(TAXONOMY.levels, TAXONOMY.num_classes, strict=True)
    }
    found = level_losses(losses, logits, labels, counts, weights, mixed)

    expected = []
    for level, name in enumerate(TAXONOMY.levels):
        total, count = 0.0, 0.0
        for row in range(4):
            parts = [(1.0, own[row, level])]
            if row in (0, 3) and level == 1:
                parts = [(0.7, own[row, level]), (0.3, other[row // 3, level])]
            for share, label in parts:
                if label >= 0:
                    target = torch.zeros(1, len(logits[name][row]), dtype=torch.float64)
                    target[0, label] = 1.0  # as a distribution
                    weight = 1.0 if weights[level] is None else weights[level][label]
                    total = total + share * weight * losses[level](logits[name][row : row + 1], target)[0]
                    count += share
        expected.append(total / count)
    for one, two, name in zip(found, expected, TAXONOMY.levels, strict=True):
        torch.testing.assert_close(one, two)
        for gradient in zip(
            torch.autograd.grad(one, logits[name]), torch.autograd.grad(two, logits[name]), strict=True
        ):
            torch.testing.assert_close(*gradient)


def test_the_plan_reads_partners_after_the_rows():
    rows = np.arange(12)
    plan = BatchPlan(
        MemoryInputs(torch.zeros(12, 1)), rows, 5, 0, mixing=mixing(MixupConfig(), labels_of([0] * 12))
    )
    for step in plan.epoch(1):
        (whole,) = step.passes
        assert whole.reads[: len(whole.rows)].tolist() == whole.rows.tolist()
        assert whole.reads[len(whole.rows) :].tolist() == whole.mix.partners.tolist()
        assert len(whole.mix.partners) == len(whole.rows)
    assert sorted(np.concatenate([step.passes[0].rows for step in plan.epoch(1)])) == rows.tolist()
