"""Two workers against one: the same global batches, the same numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hiertune
from hiertune.config import (
    AdamWConfig,
    ConditionalHeadConfig,
    ConstantProbability,
    CrossEntropyConfig,
    DWAConfig,
    EqualConfig,
    ExcludeConfig,
    FixedConfig,
    GradNormConfig,
    HierarchicalSoftmaxConfig,
    IdentityConfig,
    LinearHeadConfig,
    LinearProbability,
    MaskUnknownConfig,
    MixedHeadConfig,
    MixupConfig,
    ModelConfig,
    PathSoftmaxConfig,
    SGDConfig,
    TaxonomySmoothingConfig,
    UncertaintyConfig,
    UnknownOutcomeConfig,
)
from hiertune.data import HierarchicalDataset
from hiertune.decoding import AS_TRAINED, CRM, DecodingRule, ValidationLogits
from hiertune.errors import InputError
from hiertune.metrics import prediction_metrics
from hiertune.models import build_model
from hiertune.train.result import TrialFailed
from hiertune.train.unknown import with_unknown


@pytest.fixture(scope="module")
def data(make_data):
    return make_data()


def same_on_both(records):
    """The record of the first rank; reports and errors are the same on the other."""
    first, second = records
    for record in records:
        if record["outcome"] is None and record["error"] is not None:
            assert str(record["error"]) == str(first["error"])
    assert [(r.epoch, r.metrics, r.steps, r.last, r.seconds) for r in first["reports"]] == [
        (r.epoch, r.metrics, r.steps, r.last, r.seconds) for r in second["reports"]
    ]
    assert first["outcome"] == second["outcome"]
    assert second["parameters"] is None
    return first


CASES = {
    "cross entropy": {"loss": CrossEntropyConfig(smoothing=0.1)},
    "one row more than batches": {"batch_size": 11},
    "odd batches": {"batch_size": 7},
    "class weights": {"loss": CrossEntropyConfig(class_weights={"method": "smoothing"})},
    "smoothing": {"loss": TaxonomySmoothingConfig(alpha=0.3), "head": HierarchicalSoftmaxConfig()},
    "accumulation": {"batch_size": 3, "accumulation": 4},
    "clipping": {"grad_clip": 0.1},
    "gradnorm at the features": {"weighting": GradNormConfig(interval=2)},
    "gradnorm at the last layer": {"weighting": GradNormConfig(interval=2, at="last_layer")},
    "gradnorm of refined logits": {
        "weighting": GradNormConfig(interval=1, linear_heads=False),
        "head": ConditionalHeadConfig(temperature=0.7),
        "accumulation": 2,
    },
    "path softmax": {
        "head": PathSoftmaxConfig(),
        "weighting": GradNormConfig(interval=1, linear_heads=False),
    },
    "mixed heads": {
        "head": MixedHeadConfig(
            levels={"domain": PathSoftmaxConfig(), "genus": ConditionalHeadConfig(routing="hard")},
            default=PathSoftmaxConfig(bias=False),
        )
    },
    "changing temperature": {"head": ConditionalHeadConfig(temperature=4.0, final_temperature=0.3)},
    "batch norm": {"norm": "batch", "batch_size": 7},
    "batch norm under gradnorm at the last layer": {
        "norm": "batch",
        "weighting": GradNormConfig(interval=1, at="last_layer"),
    },
    "mixup of certain labels": {"mix": MixupConfig(min_group_size=2), "accumulation": 2},
    "mixup of families, unknown labels too": {
        "mix": MixupConfig(level="family", exclude_unknown=False, min_group_size=2),
        "loss": TaxonomySmoothingConfig(alpha=0.3, class_weights={"method": "capping"}),
        "weighting": GradNormConfig(interval=2),
    },
    "unknown outcomes": {
        "unknown": UnknownOutcomeConfig(masked=0.3, probability=LinearProbability(start=0.2, end=0.9)),
        "head": HierarchicalSoftmaxConfig(),
        "mix": MixupConfig(level="family", exclude_unknown=False, min_group_size=2),
    },
    "workers without rows": {"batch_size": 1, "epochs": 1, "loss": TaxonomySmoothingConfig()},
    "identity": {"model": ModelConfig(backbone=IdentityConfig()), "weighting": GradNormConfig(interval=1)},
    "batch norm under gradnorm at the backbone": {
        "norm": "batch",
        "weighting": GradNormConfig(interval=1, at="backbone", exclude=ExcludeConfig(types=["BatchNorm1d"])),
    },
    "gradnorm over whole steps, after a warm-up": {
        "batch_size": 3,
        "accumulation": 3,
        "weighting": GradNormConfig(
            interval=2, warmup_steps=3, accumulate=True, initial_weights="class_complexity"
        ),
    },
    "uncertainty": {"weighting": UncertaintyConfig(lr=0.1), "batch_size": 3, "accumulation": 3},
    "dwa": {"weighting": DWAConfig(temperature=0.5), "epochs": 5, "accumulation": 2},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_two_workers_agree_with_one(config, data, alone, pair, changes):
    settings = config(**changes)
    one = alone(settings, data, test_on=("test",))
    two = same_on_both(pair(settings, data, test_on=("test",)))
    assert len(one["reports"]) == len(two["reports"]) == settings.train.epochs
    for of_one, of_two in zip(one["reports"], two["reports"], strict=True):
        assert of_two.metrics == pytest.approx(of_one.metrics, rel=2e-4, abs=1e-6)
        assert of_two.steps == of_one.steps
    assert two["outcome"].metrics == pytest.approx(one["outcome"].metrics, rel=2e-4, abs=1e-6)
    for name, value in one["parameters"].items():
        torch.testing.assert_close(two["parameters"][name], value, rtol=1e-3, atol=1e-5)


HEADS = {
    "linear": LinearHeadConfig(),
    "hierarchical softmax": HierarchicalSoftmaxConfig(),
    "conditional": ConditionalHeadConfig(temperature=0.7),
    "conditional, hard, cooling": ConditionalHeadConfig(
        routing="hard", temperature=2.0, final_temperature=0.5
    ),
    "path softmax": PathSoftmaxConfig(),
    "mixed": MixedHeadConfig(default=LinearHeadConfig(), levels={"genus": PathSoftmaxConfig()}),
}
WEIGHTINGS = {
    "equal": EqualConfig(),
    "fixed": FixedConfig(weights={"family": 1.0, "genus": 3.0}),
    "gradnorm": GradNormConfig(interval=2),
    "gradnorm over whole steps": GradNormConfig(interval=1, accumulate=True, linear_heads=False),
    "gradnorm at the last layer": GradNormConfig(interval=1, at="last_layer", linear_heads=False),
    "gradnorm at the backbone": GradNormConfig(interval=3, at="backbone", accumulate=True),
    "uncertainty": UncertaintyConfig(lr=0.1),
    "dwa": DWAConfig(temperature=0.5),
}


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("head", HEADS)
def test_ten_steps_give_the_same_weights(config, make_data, alone, pair, head, weighting, accumulation):
    data = make_data(train=9 * accumulation, val=0, test=0)
    settings = config(
        hidden=[8, 6],
        head=HEADS[head],
        weighting=WEIGHTINGS[weighting],
        epochs=5,
        batch_size=5,
        accumulation=accumulation,
    )
    one = alone(settings, data, validate_on=())
    two = same_on_both(pair(settings, data, validate_on=()))
    assert one["reports"][-1].steps == two["reports"][-1].steps == 10
    for name, value in one["parameters"].items():
        torch.testing.assert_close(two["parameters"][name], value, rtol=1e-4, atol=1e-5)
    weights = [[r.metrics[f"weight/{level}"] for level in data.levels] for r in one["reports"]]
    assert (weights[0] == weights[-1]) == (weighting in ("equal", "fixed"))
    for of_one, of_two in zip(one["reports"], two["reports"], strict=True):
        assert of_two.metrics == pytest.approx(of_one.metrics, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("unknown", [MaskUnknownConfig(), UnknownOutcomeConfig()], ids=lambda c: c.kind)
def test_rows_are_named_by_rules_in_their_order(config, data, alone, pair, unknown, monkeypatch):
    settings = config(epochs=2, head=HierarchicalSoftmaxConfig(), unknown=unknown)
    rules = [AS_TRAINED, CRM, DecodingRule(head=LinearHeadConfig())]
    records = [
        alone(settings, data, test_on=("test",), rules=rules),
        same_on_both(pair(settings, data, test_on=("test",), rules=rules)),
    ]
    monkeypatch.setattr("hiertune.train.trial._EVALUATION_ROWS", 5)
    records.append(alone(settings, data, test_on=("test",), rules=rules))
    taxonomy, _ = with_unknown(unknown, data)
    labels, trained = (data.labels[data.rows(split)] for split in ("test", "train"))
    for record in records:
        outcome = record["outcome"]
        assert [found.shape for found in outcome.predictions] == [labels.shape] * 3
        metrics = prediction_metrics(outcome.predictions[0], labels, taxonomy, trained, prefix="test")
        assert metrics == {name: outcome.metrics[name] for name in metrics}
        crm = outcome.predictions[1]
        paths = taxonomy.ancestors(-1)[crm[:, -1]]
        assert np.array_equal(np.where(paths < 0, crm, paths), crm)
    for of_rule in zip(*(record["outcome"].predictions for record in records), strict=True):
        for other in of_rule[1:]:
            np.testing.assert_array_equal(of_rule[0], other)


def test_validation_logits_are_in_the_order_of_the_rows(config, data, alone, pair, tmp_path):
    settings = config(epochs=1, head=HierarchicalSoftmaxConfig())
    alone(settings, data, keep_logits=tmp_path / "one")
    same_on_both(pair(settings, data, keep_logits=tmp_path / "two"))
    one, two = (ValidationLogits.load(tmp_path / name, data.taxonomy) for name in ("one", "two"))
    torch.testing.assert_close(two.base, one.base, rtol=1e-3, atol=1e-5)
    assert torch.equal(two.labels, one.labels)
    assert all(map(torch.equal, two.seen, one.seen))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_level_that_no_row_knows_hangs_nobody(config, data, pair, weighting):
    labels = data.labels.copy()
    labels[:, 2] = -1
    blind = HierarchicalDataset(data.inputs, labels, data.ids, data.split, data.taxonomy)
    record = same_on_both(pair(config(weighting=WEIGHTINGS[weighting]), blind))
    assert record["outcome"].metrics["train/loss/genus"] == 0.0


def everything(config, weighting):
    return config(
        epochs=3,
        dropout=0.3,
        norm="batch",
        accumulation=2,
        head=ConditionalHeadConfig(routing="gumbel", temperature=3.0, final_temperature=0.3),
        weighting=weighting,
        mix=MixupConfig(level="family", min_group_size=2),
        unknown=UnknownOutcomeConfig(masked=0.5, probability=ConstantProbability(value=0.5)),
        optimizer=AdamWConfig(lr=0.01),
    )


def epochs_of(record):
    return [(r.epoch, r.metrics, r.steps) for r in record["reports"]], record["outcome"]


@pytest.mark.parametrize("weighting", ["gradnorm", "uncertainty", "dwa"])
def test_bit_identical_in_a_warm_pair_and_when_resumed(config, data, pair, tmp_path, weighting):
    settings = everything(config, WEIGHTINGS[weighting])
    first = epochs_of(same_on_both(pair(settings, data)))
    assert isinstance(pair(config(optimizer=SGDConfig(lr=1e30)), data)[0]["error"], TrialFailed)
    assert epochs_of(same_on_both(pair(settings, data))) == first
    stopped = same_on_both(pair(settings, data, checkpoint=tmp_path / "checkpoint", stop_at=1))
    assert stopped["outcome"].stopped
    resumed = same_on_both(pair(settings, data, checkpoint=tmp_path / "checkpoint"))
    assert epochs_of(resumed) == (first[0][1:], first[1])


def test_dropout_differs_between_workers(config, make_data, pair):
    """Two copies of a row, one per worker: where only one keeps an input, its weight moves half as far."""
    double = make_data(train=2, val=4, test=0, features=400)
    double.inputs.tensor.fill_(1.0)
    double.labels[double.rows("train")] = [0, 0, 0]
    backbone = IdentityConfig(dropout=0.5, standardize=False)
    settings = config(epochs=1, batch_size=2, model=ModelConfig(backbone=backbone))
    moved = pair(settings, double)[0]["parameters"]["head.linear.layers.0.weight"]
    torch.manual_seed(settings.train.seed)
    start = build_model(settings.model, double.taxonomy, (400,), None).head.linear["domain"].weight
    distance = (moved - start).abs()[0].detach()
    kept_by = (2 * distance / distance.max()).round().int()
    assert torch.bincount(kept_by, minlength=3).tolist() == pytest.approx([100, 200, 100], abs=40)


def test_failure_is_raised_by_all_together(config, data, pair):
    first, second = pair(config(optimizer=SGDConfig(lr=1e30), batch_size=9), data)
    for record in (first, second):
        assert isinstance(record["error"], TrialFailed)
        assert record["error"].reason == "train/loss is not finite at epoch 1, step 2"


def test_one_rank_without_a_finite_loss_fails_all(config, data, pair):
    """The bad row is in the first batch, so one worker alone sees it there."""
    inputs = data.inputs.tensor.clone()
    bad = HierarchicalDataset(type(data.inputs)(inputs), data.labels, data.ids, data.split, data.taxonomy)
    row = int(data.rows("train")[0])
    inputs[row] = float("inf")
    records = pair(config(standardize=False, batch_size=1000), bad)
    assert [record["error"].reason for record in records] == [
        "train/loss is not finite at epoch 1, step 1"
    ] * 2


TOGETHER = """
import sys
import torch.distributed as dist
from hiertune.errors import InputError
from hiertune.train.workers import Workers

rank = int(sys.argv[2])
dist.init_process_group("gloo", f"file://{sys.argv[1]}", rank=rank, world_size=2)
workers = Workers.current()
with workers.together():
    pass
try:
    with workers.together():
        if rank == 1:
            raise InputError("only here", file="f")
except InputError as error:
    print(error)
dist.destroy_process_group()
"""


def test_an_input_error_of_one_is_raised_by_all(tmp_path):
    loopback = {} if sys.platform == "darwin" else {"GLOO_SOCKET_IFNAME": "lo"}
    environment = {**os.environ, "PYTHONPATH": str(Path(hiertune.__file__).parents[1]), **loopback}
    command = [sys.executable, "-c", TOGETHER, str(tmp_path / "store")]
    both = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, env=environment)
        for rank in range(2)
    ]
    assert [process.communicate(timeout=60)[0] for process in both] == ["f: only here\n"] * 2


def test_stop_is_obeyed_by_both(config, data, pair):
    record = same_on_both(pair(config(epochs=6), data, stop_at=2))
    assert [r.epoch for r in record["reports"]] == [1, 2]
    assert record["outcome"].stopped


def test_bad_input_leaves_the_pair_usable(config, data, pair, tmp_path):
    for record in pair(config(norm="batch", batch_size=1), data):
        assert isinstance(record["error"], InputError)
    pair(config(), data, checkpoint=tmp_path / "checkpoint", stop_at=1)
    for record in pair(config(seed=5), data, checkpoint=tmp_path / "checkpoint"):
        assert isinstance(record["error"], InputError)
    assert same_on_both(pair(config(), data))["outcome"].epochs == 3
