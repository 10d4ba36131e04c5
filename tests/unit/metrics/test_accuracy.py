"""Evaluation against loops over rows, and its sums over batches and ranks."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertune import Taxonomy
from hiertune.metrics import Evaluation, prediction_metrics, seen_classes

TAXONOMY = Taxonomy.from_parents(["a", "b", "c"], [[-1, -1], [0, 1, 1, -1], [0, 0, 1, 2, 3, 3, -1, -1]])
TRAIN_LABELS = np.array([[0, 0, 0], [1, 1, -1], [-1, -1, 5], [1, -1, 2]])
SEEN = [{0, 1}, {0, 1}, {0, 2, 5}]
"""The classes that occur in TRAIN_LABELS."""


def make_rows(seed: int, rows: int):
    """Logits (no two of a row are equal), labels, and a loss for each."""
    random = np.random.default_rng(seed)
    logits = {
        level: torch.from_numpy(random.permuted(np.tile(np.arange(size) / 7, (rows, 1)), axis=1))
        for level, size in zip(TAXONOMY.levels, TAXONOMY.num_classes, strict=True)
    }
    labels = np.stack([random.integers(-1, size, rows) for size in TAXONOMY.num_classes], 1)
    losses = torch.from_numpy(random.random((rows, 3)))
    return logits, torch.from_numpy(labels), losses


def evaluate(batches) -> Evaluation:
    evaluation = Evaluation(TAXONOMY, seen_classes(TRAIN_LABELS, TAXONOMY))
    for logits, labels, losses in batches:
        evaluation.add(logits, labels, list((losses * (labels >= 0)).sum(0)))
    return evaluation


def naive(logits, labels, losses, prefix="val") -> dict[str, float]:
    """Every metric by its definition, row by row."""

    def mean(values) -> float:
        values = list(values)
        return sum(values) / len(values) if values else 0.0

    rows = range(len(labels))
    order = {  # classes from the best
        level: [sorted(range(len(row)), key=lambda c, row=row: -row[c]) for row in logits[level].tolist()]
        for level in TAXONOMY.levels
    }
    metrics = {}
    for i, level in enumerate(TAXONOMY.levels):
        y = labels[:, i].tolist()
        known = [r for r in rows if y[r] >= 0]
        metrics[f"loss/{level}"] = mean(losses[r, i].item() for r in known)
        metrics[f"accuracy/{level}"] = mean(order[level][r][0] == y[r] for r in known)
        metrics[f"top5_accuracy/{level}"] = mean(y[r] in order[level][r][:5] for r in known)
        metrics[f"accuracy_seen/{level}"] = mean(order[level][r][0] == y[r] for r in known if y[r] in SEEN[i])
    metrics["loss"] = sum(metrics[f"loss/{level}"] for level in TAXONOMY.levels)
    right = [
        [order[level][r][0] == labels[r, i].item() if labels[r, i] >= 0 else None
         for i, level in enumerate(TAXONOMY.levels)]
        for r in rows
    ]  # fmt: skip
    metrics["chain_accuracy"] = mean(all(row) for row in right if None not in row)
    metrics["partial_chain_accuracy"] = mean(
        False not in row for row in right if any(known is not None for known in row)
    )
    metrics["hierarchical_distance"] = mean(
        TAXONOMY.class_distances("c", order["c"][r][0], labels[r, 2]).item()
        for r in rows
        if right[r][2] is False
    )
    metrics["average_distance"] = mean(
        TAXONOMY.class_distances("c", order["c"][r][0], labels[r, 2]).item()
        for r in rows
        if right[r][2] is not None
    )
    return {f"{prefix}/{name}": value for name, value in metrics.items()}


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(0, 12))
def test_equals_a_loop_over_rows(seed, rows):
    data = make_rows(seed, rows)
    ours, theirs = evaluate([data]).compute("val"), naive(*data)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-12, abs=1e-12), name


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_batches_and_ranks_add_up_exactly(seed, sizes):
    """Counts are whole numbers; the losses are multiples of 1/1024, so that their sums are exact, too."""
    logits, labels, losses = make_rows(seed, sum(sizes))
    losses = (losses * 1024).round() / 1024
    starts = np.cumsum([0, *sizes])
    parts = [
        ({level: scores[a:b] for level, scores in logits.items()}, labels[a:b], losses[a:b])
        for a, b in pairwise(starts)
    ]
    whole = evaluate([(logits, labels, losses)])
    in_batches = evaluate(parts)
    ranks = [evaluate(parts[0::2]), evaluate(parts[1::2])]
    ranks[0].state += ranks[1].state
    assert torch.equal(in_batches.state, whole.state)
    assert torch.equal(ranks[0].state, whole.state)
    assert ranks[0].compute("val") == whole.compute("val")


def test_a_level_of_no_more_than_five_classes_is_always_in_the_top_five():
    metrics = evaluate([make_rows(0, 50)]).compute("val")
    assert metrics["val/top5_accuracy/a"] == metrics["val/top5_accuracy/b"] == 1.0
    assert 0 < metrics["val/top5_accuracy/c"] < 1.0


def test_among_equal_logits_one_is_right_and_five_are_near():
    logits = {level: torch.zeros(8, size) for level, size in zip("abc", TAXONOMY.num_classes, strict=True)}
    labels = torch.stack([torch.zeros(8, dtype=torch.int64)] * 2 + [torch.arange(8)], 1)
    metrics = evaluate([(logits, labels, torch.zeros(8, 3))]).compute("val")
    assert metrics["val/accuracy/c"] == 1 / 8
    assert metrics["val/top5_accuracy/c"] == 5 / 8


def test_an_infinite_loss_shows():
    logits, labels, losses = make_rows(0, 20)
    losses[labels[:, 1] >= 0, 1] = math.nan
    metrics = evaluate([(logits, labels, losses)]).compute("val")
    assert math.isnan(metrics["val/loss/b"])
    assert math.isnan(metrics["val/loss"])
    assert math.isfinite(metrics["val/loss/a"])


def test_without_rows_everything_is_zero():
    metrics = evaluate([]).compute("test")
    assert set(metrics.values()) == {0.0}
    assert all(name.startswith("test/") for name in metrics)


def test_add_does_not_keep_a_graph():
    logits, labels, _ = make_rows(0, 4)
    for scores in logits.values():
        scores.requires_grad_()
    evaluation = Evaluation(TAXONOMY, seen_classes(TRAIN_LABELS, TAXONOMY))
    evaluation.add(logits, labels, [scores.sum() for scores in logits.values()])
    assert not evaluation.state.requires_grad
    assert evaluation.state.dtype == torch.float64


def test_seen_classes():
    seen = seen_classes(TRAIN_LABELS, TAXONOMY)
    assert [set(torch.nonzero(classes)[:, 0].tolist()) for classes in seen] == SEEN
    assert [len(classes) for classes in seen] == list(TAXONOMY.num_classes)
    assert all(classes.dtype == torch.bool for classes in seen)


@pytest.mark.parametrize("seed", range(3))
def test_metrics_of_predictions_are_those_of_logits(seed):
    logits, labels, losses = make_rows(seed, 40)
    predictions = np.stack([logits[level].argmax(1).numpy() for level in TAXONOMY.levels], 1)
    ours = prediction_metrics(predictions, labels.numpy(), TAXONOMY, TRAIN_LABELS, prefix="test")
    theirs = naive(logits, labels, losses, "test")
    assert set(theirs) - set(ours) == {name for name in theirs if name.startswith(("test/loss", "test/top5"))}
    for name, value in ours.items():
        assert value == pytest.approx(theirs[name], rel=1e-12), name


def test_a_prediction_of_nothing_is_wrong_everywhere():
    labels = TAXONOMY.ancestors("c")[:4]
    metrics = prediction_metrics(np.full((4, 3), -1), labels, TAXONOMY, labels, prefix="test")
    assert metrics.pop("test/hierarchical_distance") == metrics.pop("test/average_distance") == 3.0
    assert set(metrics.values()) == {0.0}
