"""One worker: the arithmetic of a step, reproducibility, resuming, failing."""

from __future__ import annotations

import errno
import math
import os
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hiertune.config import (
    AdamWConfig,
    ConditionalHeadConfig,
    CosineConfig,
    CrossEntropyConfig,
    DWAConfig,
    ExcludeConfig,
    FixedConfig,
    GradNormConfig,
    HierarchicalSoftmaxConfig,
    SGDConfig,
    TaxonomySmoothingConfig,
    UncertaintyConfig,
)
from hiertune.data import HierarchicalDataset
from hiertune.decoding import ValidationLogits, try_rules
from hiertune.errors import InputError
from hiertune.models import build_model
from hiertune.train.batches import BatchPlan
from hiertune.train.checkpoint import Checkpoint, CheckpointClock
from hiertune.train.loop import run_trial
from hiertune.train.result import TrialFailed
from hiertune.train.settings import trial_settings
from hiertune.train.standardize import standardization
from hiertune.train.trial import Trial
from hiertune.weighting.gradnorm import initial_weights


@pytest.fixture(scope="module")
def data(make_data):
    return make_data()


@pytest.fixture
def every_epoch(monkeypatch):
    """A checkpoint after every epoch, however short."""
    monkeypatch.setattr(CheckpointClock, "least_seconds", 0.0)
    monkeypatch.setattr(CheckpointClock, "share", math.inf)


@pytest.fixture
def rich(config):
    """A config in which everything that has state or draws random numbers takes part."""
    return config(
        epochs=4,
        batch_size=6,
        accumulation=2,
        dropout=0.3,
        input_dropout=0.1,
        norm="batch",
        head=ConditionalHeadConfig(routing="gumbel", temperature=3.0, final_temperature=0.3),
        loss=TaxonomySmoothingConfig(),
        weighting=GradNormConfig(interval=2),
        optimizer=AdamWConfig(lr=0.01),
        schedule=CosineConfig(),
    )


def comparable(record):
    """Everything of a record that must be bit-identical."""
    epochs = [(r.epoch, r.metrics, r.steps, r.last) for r in record["reports"]]
    parameters = {name: value.tolist() for name, value in (record["parameters"] or {}).items()}
    return epochs, record["outcome"], parameters


def same_parameters(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance)


def fresh_model(config, data, fit_on=("train",)):
    torch.manual_seed(config.train.seed)
    shape = tuple(data.inputs.shape[1:])
    return build_model(config.model, data.taxonomy, shape, standardization(data, fit_on))


def mean_losses(model, data, rows):
    """Cross-entropy of each level over the rows that are known there."""
    logits = model(data.inputs.rows(rows))
    labels = torch.from_numpy(data.labels[rows])
    return [
        F.cross_entropy(logits[level], labels[:, i], ignore_index=-1) for i, level in enumerate(data.levels)
    ]


# ------------------------------------------------------------------------------------ arithmetic


def test_one_step_is_gradient_descent_on_the_weighted_mean_losses(config, data, alone):
    weights = {"domain": 0.0, "family": 1.0, "genus": 3.0}
    settings = config(
        epochs=1, batch_size=1000, weighting=FixedConfig(weights=weights), optimizer=SGDConfig(lr=0.5)
    )
    record = alone(settings, data)
    model = fresh_model(settings, data)
    losses = mean_losses(model, data, data.rows("train"))
    (losses[0] * 0.0 + losses[1] * 0.75 + losses[2] * 2.25).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(record["parameters"][name], parameter - 0.5 * parameter.grad)
    metrics = record["reports"][0].metrics
    for level, loss in zip(data.levels, losses, strict=True):
        assert metrics[f"train/loss/{level}"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["train/loss"] == pytest.approx(sum(losses).item(), rel=1e-5)
    assert [metrics[f"weight/{level}"] for level in data.levels] == [0.0, 0.75, 2.25]


def test_training_loss_is_the_mean_over_known_labels_of_the_epoch(config, data, alone):
    settings = config(epochs=1, batch_size=7, optimizer=SGDConfig(lr=1e-12))
    metrics = alone(settings, data)["reports"][0].metrics
    losses = mean_losses(fresh_model(settings, data), data, data.rows("train"))
    for level, loss in zip(data.levels, losses, strict=True):
        assert metrics[f"train/loss/{level}"] == pytest.approx(loss.item(), rel=1e-5)


def test_validation_is_exact_and_without_class_weights(config, data, alone):
    loss = CrossEntropyConfig(class_weights={"method": "smoothing"})
    record = alone(config(epochs=1, loss=loss, dropout=0.5), data)
    metrics = record["reports"][0].metrics
    model = fresh_model(config(), data)
    model.load_state_dict(record["parameters"])
    rows = data.rows("val")
    with torch.no_grad():
        losses = mean_losses(model.eval(), data, rows)
        answers = model(data.inputs.rows(rows))["genus"].argmax(1).numpy()
    for level, value in zip(data.levels, losses, strict=True):
        assert metrics[f"val/loss/{level}"] == pytest.approx(value.item(), rel=1e-5)
    truth = data.labels[rows, 2]
    assert metrics["val/accuracy/genus"] == (answers == truth)[truth >= 0].mean()


def test_evaluation_in_small_batches_changes_nothing(config, data, alone, monkeypatch):
    whole = alone(config(epochs=1), data)["reports"][0].metrics
    monkeypatch.setattr("hiertune.train.trial._EVALUATION_ELEMENTS", 7 * 5)
    assert alone(config(epochs=1), data)["reports"][0].metrics == pytest.approx(whole)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": TaxonomySmoothingConfig(), "head": HierarchicalSoftmaxConfig()},
        {"weighting": GradNormConfig(interval=1, accumulate=True), "head": HierarchicalSoftmaxConfig()},
        {"weighting": GradNormConfig(interval=2, accumulate=True, at="last_layer")},
        {"weighting": GradNormConfig(interval=1, accumulate=True, at="backbone")},
        {"weighting": UncertaintyConfig(lr=0.1)},
        {"weighting": DWAConfig(temperature=0.2), "epochs": 4},
    ],
    ids=[
        "cross entropy",
        "smoothing",
        "gradnorm",
        "gradnorm at the last layer",
        "gradnorm at the backbone",
        "uncertainty",
        "dwa",
    ],
)
def test_accumulated_passes_equal_one_large_batch(config, data, alone, changes):
    changes = {"epochs": 2} | changes
    few = alone(config(batch_size=4, accumulation=3, **changes), data)
    one = alone(config(batch_size=12, **changes), data)
    assert few["outcome"].metrics == pytest.approx(one["outcome"].metrics, rel=1e-4)
    same_parameters(few["parameters"], one["parameters"], rtol=1e-4, atol=1e-5)
    assert few["reports"][-1].steps == one["reports"][-1].steps == 4 * changes["epochs"]


def test_gradnorm_measures_the_last_pass_of_a_step(config, data, alone):
    """Losses are means over the known rows of that pass, gradients those of them at the features."""
    settings = config(epochs=1, batch_size=25, accumulation=2, weighting=GradNormConfig(interval=1))
    metrics = alone(settings, data)["reports"][0].metrics
    plan = BatchPlan(data.inputs, data.rows("train"), 25, settings.train.seed, 2)
    (step,) = plan.epoch(1)
    assert [len(each.rows) for each in step.passes] == [25, 20]
    model = fresh_model(settings, data)
    losses = mean_losses(model, data, step.passes[1].rows)
    for level, loss in zip(data.levels, losses, strict=True):
        (gradient,) = torch.autograd.grad(loss, model.features, retain_graph=True)
        assert metrics[f"grad_norm/{level}"] == pytest.approx(gradient.norm().item(), rel=1e-5)


def test_gradnorm_weights_count_from_the_next_step(config, data, alone):
    weighting = GradNormConfig(interval=1, lr=1.0)
    first = alone(config(epochs=1, batch_size=1000, weighting=weighting), data)
    equal = alone(config(epochs=1, batch_size=1000), data)
    same_parameters(first["parameters"], equal["parameters"], rtol=0, atol=0)
    metrics = first["reports"][0].metrics
    weights = np.array([metrics[f"weight/{level}"] for level in data.levels])
    norms = np.array([metrics[f"grad_norm/{level}"] for level in data.levels])
    np.testing.assert_allclose(weights, 3 / norms / (1 / norms).sum(), rtol=1e-5)


def epochs_of(record, data, name):
    """`name/<level>` of each epoch, `[E, L]`."""
    return [[r.metrics[f"{name}/{level}"] for level in data.levels] for r in record["reports"]]


def test_gradnorm_starts_after_its_warm_up_from_its_initial_weights(config, data, alone):
    """Three steps an epoch: the first update is in the first step of the third epoch."""
    weighting = GradNormConfig(interval=2, warmup_steps=6, initial_weights="inverse_density")
    record = alone(config(epochs=3, batch_size=15, weighting=weighting), data)
    weights = epochs_of(record, data, "weight")
    labels = data.labels[data.rows("train")]
    expected = initial_weights("inverse_density", labels, data.taxonomy.num_classes).tolist()
    assert weights[0] == weights[1] == expected
    assert len(set(expected)) > 1
    assert weights[2] != expected
    named = [{name for name in r.metrics if name.startswith("grad_norm/")} for r in record["reports"]]
    assert [len(names) for names in named] == [0, 0, 3]


def test_all_that_gradnorm_measures_is_reported_by_epoch(config, data, alone):
    record = alone(config(weighting=GradNormConfig(interval=1)), data)
    for name in ("weight", "grad_norm", "target", "rate"):
        assert len(epochs_of(record, data, name)) == 3


def test_uncertainty_learns_from_the_losses_of_every_step(config, data, alone):
    """One step an epoch, whose losses are reported: Kendall's s by autograd gives the same weights."""
    settings = config(epochs=6, batch_size=1000, weighting=UncertaintyConfig(lr=0.3))
    record = alone(settings, data)
    s = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([s], lr=0.3)
    losses = torch.tensor(epochs_of(record, data, "train/loss"), dtype=torch.float64)
    for of_step, weights in zip(losses, epochs_of(record, data, "weight"), strict=True):
        adam.zero_grad()
        ((-s).exp() * of_step + s / 2).sum().backward()
        adam.step()
        assert weights == pytest.approx((-s).exp().tolist(), rel=1e-6)


def test_dwa_follows_the_losses_of_the_epochs(config, data, alone):
    record = alone(config(epochs=5, weighting=DWAConfig(temperature=0.5)), data)
    losses = torch.tensor(epochs_of(record, data, "train/loss"), dtype=torch.float64)
    weights = torch.tensor(epochs_of(record, data, "weight"), dtype=torch.float64)
    assert torch.equal(weights[:2], torch.ones(2, 3, dtype=torch.float64))
    expected = 3 * (losses[1:-1] / losses[:-2] / 0.5).softmax(1)
    torch.testing.assert_close(weights[2:], expected, rtol=1e-6, atol=0)


def test_dwa_weights_are_those_that_were_trained_with(config, data, alone):
    """One step an epoch: the third descends the weighted losses."""
    changes = {
        "batch_size": 1000,
        "weighting": DWAConfig(temperature=0.1),
        "optimizer": SGDConfig(lr=0.05, momentum=0.0),
    }
    settings = config(epochs=3, **changes)
    before = alone(config(epochs=2, **changes), data)
    record = alone(settings, data)
    model = fresh_model(settings, data)
    model.load_state_dict(before["parameters"])
    weights = torch.tensor(epochs_of(record, data, "weight")[2])
    assert weights.max() - weights.min() > 0.01
    (torch.stack(mean_losses(model, data, data.rows("train"))) @ weights).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(record["parameters"][name], parameter - 0.05 * parameter.grad)


def test_clipping_bounds_the_whole_gradient(config, data, alone):
    settings = config(epochs=1, batch_size=1000, grad_clip=0.01, optimizer=SGDConfig(lr=1.0))
    record = alone(settings, data)
    before = fresh_model(settings, data)
    moved = [record["parameters"][name] - value for name, value in before.named_parameters()]
    assert math.sqrt(sum(m.square().sum().item() for m in moved)) == pytest.approx(0.01, rel=1e-4)


def test_the_learning_rate_follows_the_schedule_by_step(config, data, alone):
    settings = config(
        epochs=3, batch_size=15, optimizer=SGDConfig(lr=0.2), schedule=CosineConfig(warmup=0.5, final=0.1)
    )
    rates = [r.metrics["lr"] for r in alone(settings, data)["reports"]]
    # 9 steps, 4 of them warm-up; the last steps of the epochs are 2, 5 and 8
    expected = [0.75, 0.1 + 0.9 * (1 + math.cos(math.pi * 2 / 5)) / 2, 0.1]
    assert rates == pytest.approx([0.2 * factor for factor in expected])


def test_the_temperature_follows_the_steps(config, data):
    """The first step has the start's, the last the final one; evaluation that of the step before it."""
    head = ConditionalHeadConfig(temperature=4.0, final_temperature=1.0, temperature_schedule="linear")
    settings = config(epochs=2, batch_size=15, head=head, accumulation=2)
    seen = []
    with trial_settings(settings.train, torch.device("cpu")):
        trial = Trial(settings, data, ("train",), torch.device("cpu"))
        trial.model.register_forward_pre_hook(lambda *_: seen.append(trial.model.head.temperatures["genus"]))
        for _ in range(2):
            trial.train_epoch()
            trial.evaluate("val", data.rows("val"))
    # per epoch a step of two passes, one of one, and one batch of validation
    assert seen == pytest.approx([4.0, 4.0, 3.0, 3.0, 2.0, 2.0, 1.0, 1.0])
    assert (seen[0], seen[-1]) == (4.0, 1.0)


def test_a_trial_of_one_step_has_the_final_temperature(config, data):
    settings = config(epochs=1, batch_size=1000, head=ConditionalHeadConfig(final_temperature=0.5))
    with trial_settings(settings.train, torch.device("cpu")):
        trial = Trial(settings, data, ("train",), torch.device("cpu"))
        trial.train_epoch()
    assert trial.model.head.temperatures["genus"] == 0.5


def test_it_learns(config, data, alone):
    record = alone(config(epochs=15, optimizer=AdamWConfig(lr=0.02)), data)
    assert record["outcome"].metrics["val/accuracy/genus"] > 0.8


def test_bf16_is_near_fp32(config, data, alone):
    exact, near = (
        alone(config(epochs=1, precision=precision), data)["outcome"].metrics["val/loss"]
        for precision in ("fp32", "bf16")
    )
    assert near != exact
    assert near == pytest.approx(exact, rel=0.02)


# ------------------------------------------------------------------------------- reproducibility


def pollute():
    torch.manual_seed(987)
    torch.randn(17)
    np.random.seed(5)


@pytest.mark.parametrize("rows", [1024, 5])
def test_the_last_epochs_validation_logits_are_kept(rich, data, alone, tmp_path, monkeypatch, rows):
    monkeypatch.setattr("hiertune.train.trial._EVALUATION_ROWS", rows)
    path = tmp_path / "trial" / "val_logits"
    record = alone(rich, data, keep_logits=path)
    logits = ValidationLogits.load(path, data.taxonomy)
    model = build_model(rich.model, data.taxonomy, (6,), standardization(data, ("train",)))
    model.load_state_dict(record["parameters"])
    model.eval()(data.inputs.rows(data.rows("val")))
    for level, base in model.base_logits.items():
        torch.testing.assert_close(logits.base[level], base.detach())
    assert logits.labels.tolist() == data.labels[data.rows("val")].tolist()
    for column, seen in enumerate(logits.seen):
        assert set(seen.nonzero().flatten().tolist()) == set(data.labels[data.rows("train"), column]) - {-1}
    as_trained, *_ = try_rules(logits, data.taxonomy, rich.model.head)
    told = record["reports"][-1].metrics
    assert as_trained.metrics == {name: told[name] for name in as_trained.metrics}


def test_a_trial_that_is_stopped_keeps_no_logits(config, data, alone, tmp_path):
    alone(config(), data, keep_logits=tmp_path / "logits", stop_at=2)
    alone(config(), data, keep_logits=tmp_path / "logits", validate_on=())
    assert not (tmp_path / "logits").exists()


def test_logits_are_kept_at_full_width_under_autocast(config, data, alone, tmp_path):
    alone(config(precision="bf16"), data, keep_logits=tmp_path / "logits")
    logits = ValidationLogits.load(tmp_path / "logits", data.taxonomy)
    assert {base.dtype for base in logits.base.values()} == {torch.float32}


def test_bit_identical_whatever_ran_before(rich, config, data, alone):
    first = comparable(alone(rich, data))
    pollute()
    alone(config(seed=3, dropout=0.5), data)
    assert comparable(alone(rich, data)) == first
    failed = alone(config(optimizer=SGDConfig(lr=1e30)), data)
    assert isinstance(failed["error"], TrialFailed)
    alone(rich, data, kill_at=2)
    assert comparable(alone(rich, data)) == first


def test_the_seed_decides(config, data, alone):
    losses = {alone(config(epochs=1, seed=seed), data)["outcome"].metrics["val/loss"] for seed in (0, 1)}
    assert len(losses) == 2


def test_global_settings_have_no_influence_and_come_back(rich, data, alone):
    first = comparable(alone(rich, data))
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    try:
        torch.manual_seed(11)
        with torch.no_grad():
            record = alone(rich, data)
            assert not torch.is_grad_enabled()
        after = torch.rand(1)
        assert torch.get_default_dtype() == torch.float64
        assert torch.get_num_threads() == 2
        assert not torch.are_deterministic_algorithms_enabled()
        torch.manual_seed(11)
        assert torch.equal(torch.rand(1), after)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)
    assert comparable(record) == first


# -------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("kill_at", [1, 2, 3, 4])
def test_resumed_is_bit_identical_to_uninterrupted(rich, data, alone, tmp_path, every_epoch, kill_at):
    whole = comparable(alone(rich, data))
    checkpoint = tmp_path / "checkpoint"
    killed = alone(rich, data, checkpoint=checkpoint, kill_at=kill_at)
    assert killed["outcome"] is None
    resumed = alone(rich, data, checkpoint=checkpoint)
    epochs, outcome, parameters = comparable(resumed)
    assert epochs == whole[0][kill_at - 1 :]  # killed in its report: that epoch is repeated
    assert (outcome, parameters) == whole[1:]


@pytest.mark.parametrize(
    "weighting",
    [
        UncertaintyConfig(lr=0.1),
        DWAConfig(temperature=0.5),
        GradNormConfig(interval=3, warmup_steps=5, at="backbone", accumulate=True),
    ],
    ids=lambda weighting: weighting.kind,
)
@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_resumed_weights_are_bit_identical(rich, data, alone, tmp_path, weighting, stop_at):
    settings = rich.model_copy(update={"weighting": weighting})
    whole = comparable(alone(settings, data))
    alone(settings, data, checkpoint=tmp_path / "checkpoint", stop_at=stop_at)
    resumed = comparable(alone(settings, data, checkpoint=tmp_path / "checkpoint"))
    assert resumed == (whole[0][stop_at:], *whole[1:])


def test_a_stopped_trial_can_be_taken_up_again(rich, data, alone, tmp_path):
    whole = comparable(alone(rich, data))
    stopped = alone(rich, data, checkpoint=tmp_path / "checkpoint", stop_at=2)
    assert (stopped["outcome"].epochs, stopped["outcome"].stopped) == (2, True)
    assert comparable(stopped)[0] == whole[0][:2]
    resumed = alone(rich, data, checkpoint=tmp_path / "checkpoint")
    assert comparable(resumed) == (whole[0][2:], *whole[1:])


def test_evaluation_after_resuming_is_that_before(rich, data, alone, tmp_path):
    stopped = alone(rich, data, checkpoint=tmp_path / "checkpoint", stop_at=2)
    cpu = torch.device("cpu")
    with trial_settings(rich.train, cpu):
        trial = Trial(rich, data, ("train",), cpu)
        trial.resume(Checkpoint(tmp_path / "checkpoint"))
        metrics = trial.evaluate("val", data.rows("val"))
    assert metrics.items() <= stopped["outcome"].metrics.items()


def test_a_damaged_checkpoint_falls_back_to_the_one_before(rich, data, alone, tmp_path, every_epoch):
    whole = comparable(alone(rich, data))
    checkpoint = tmp_path / "checkpoint"
    alone(rich, data, checkpoint=checkpoint, kill_at=4)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    resumed = alone(rich, data, checkpoint=checkpoint)
    assert comparable(resumed) == (whole[0][2:], *whole[1:])
    assert f"the checkpoint {checkpoint} is damaged: the one before it is used" in resumed["reports"][0].notes


@pytest.mark.parametrize("lasting", [True, False])
def test_a_disk_that_is_full_costs_the_checkpoints_and_one_note(
    rich, data, alone, tmp_path, every_epoch, monkeypatch, lasting
):
    whole, checkpoint = alone(rich, data), tmp_path / "trial" / "checkpoint"
    real, full = os.fsync, [True]

    def fsync(descriptor):
        if full[0]:
            full[0] = lasting
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("hiertune.storage.os.fsync", fsync)
        record = alone(rich, data, checkpoint=checkpoint)
    assert comparable(record) == comparable(whole)
    said = [[note for note in report.notes if "checkpoint" in note] for report in record["reports"]]
    assert said == [
        [],
        ["checkpoint of epoch 1 could not be saved: No space left on device"],
        *([] for _ in range(2)),
    ]
    left = sorted(file.name for file in checkpoint.parent.iterdir())
    assert left == ([] if lasting else ["checkpoint", "checkpoint.other"])


def test_logits_that_cannot_be_kept_cost_the_logits_and_a_note(config, data, alone, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    record = alone(config(), data, keep_logits=tmp_path / "file" / "logits")
    assert comparable(record) == comparable(alone(config(), data))
    assert record["reports"][-1].notes == ("the validation logits could not be saved: File exists",)


def test_a_beat_for_every_batch_trained_or_evaluated(config, data, alone):
    beats = []
    settings = config(epochs=2, batch_size=8)
    alone(settings, data, beat=lambda: beats.append(len(beats)))
    steps, evaluated = math.ceil(45 / 8), 1
    assert len(beats) in (2 * (steps + evaluated), 2 * (45 // 8 + evaluated))


@pytest.mark.parametrize("kill_at", [2, 4])
def test_resumed_from_storage_is_bit_identical(rich, data, alone, s3_folder, every_epoch, kill_at):
    """Checkpoints are sent while training goes on: each is the state of the moment that it was begun in."""
    whole = comparable(alone(rich, data))
    address = f"{s3_folder}/trial/checkpoint"
    assert comparable(alone(rich, data, checkpoint=f"{s3_folder}/other/checkpoint")) == whole
    alone(rich, data, checkpoint=address, kill_at=kill_at)
    resumed = alone(rich, data, checkpoint=address)
    first = resumed["reports"][0].epoch
    assert 1 <= first <= kill_at, "one that was still on its way may be skipped, none is half there"
    assert comparable(resumed) == (whole[0][first - 1 :], *whole[1:])


def test_a_trial_that_was_stopped_has_its_last_state_in_storage(rich, data, alone, s3_folder):
    whole = comparable(alone(rich, data))
    address = f"{s3_folder}/trial/checkpoint"
    alone(rich, data, checkpoint=address, stop_at=3)
    assert comparable(alone(rich, data, checkpoint=address)) == (whole[0][3:], *whole[1:])


def test_storage_that_fails_costs_no_epoch(rich, data, alone, faulty_s3, s3_folder, every_epoch, caplog):
    whole = comparable(alone(rich, data))

    def of_writing(method, path):
        return 500 if method in ("PUT", "POST") else None

    faulty_s3.fault = of_writing
    record = alone(
        rich, data, checkpoint=f"{s3_folder}/trial/checkpoint", keep_logits=f"{s3_folder}/val_logits"
    )
    assert comparable(record) == whole
    notes = [note for report in record["reports"] for note in report.notes]
    assert "checkpoint of epoch 1 could not be saved" in caplog.text
    assert sum("the validation logits could not be saved" in note for note in notes) == 1


def test_resume_can_be_declined(config, data, alone, tmp_path):
    alone(config(), data, checkpoint=tmp_path / "checkpoint", stop_at=1)
    again = alone(config(), data, checkpoint=tmp_path / "checkpoint", resume=False)
    assert [r.epoch for r in again["reports"]] == [1, 2, 3]


def test_a_checkpoint_of_another_trial_is_refused(config, data, make_data, alone, tmp_path):
    options = {"checkpoint": tmp_path / "checkpoint"}
    alone(config(), data, stop_at=1, **options)
    others = [
        alone(config(dropout=0.1), data, **options),
        alone(config(), make_data(seed=1), **options),
        alone(config(), data, fit_on=("train", "val"), **options),
    ]
    for other in others:
        assert isinstance(other["error"], InputError)
        assert str(tmp_path) in str(other["error"])


def test_short_epochs_are_not_slowed_down_by_checkpoints(config, data, alone, tmp_path):
    alone(config(epochs=5), data, checkpoint=tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------- ends and bad input


def test_stop_ends_after_that_epoch(config, data, alone):
    record = alone(config(epochs=5), data, stop_at=2, test_on=("test",))
    assert [(r.epoch, r.last) for r in record["reports"]] == [(1, False), (2, False)]
    assert record["outcome"].stopped
    assert record["outcome"].epochs == 2
    assert "test/loss" in record["outcome"].metrics
    assert record["parameters"] is not None


def test_stop_at_the_last_epoch_is_no_stop(config, data, alone, tmp_path):
    record = alone(config(), data, stop_at=3, checkpoint=tmp_path / "checkpoint")
    assert [r.last for r in record["reports"]] == [False, False, True]
    assert not record["outcome"].stopped
    assert list(tmp_path.iterdir()) == []


def test_refit_trains_on_both_splits_and_measures_the_test_rows(config, data, alone):
    settings = config(epochs=2)
    record = alone(settings, data, fit_on=("train", "val"), validate_on=(), test_on=("test",))
    metrics = record["outcome"].metrics
    assert not [name for name in metrics if name.startswith("val/")]
    assert not [name for r in record["reports"] for name in r.metrics if name.startswith("test/")]
    model = fresh_model(settings, data, ("train", "val"))
    model.load_state_dict(record["parameters"])
    rows = data.rows("test")
    with torch.no_grad():
        answers = model.eval()(data.inputs.rows(rows))["genus"].argmax(1).numpy()
    truth = data.labels[rows, 2]
    assert metrics["test/accuracy/genus"] == (answers == truth)[truth >= 0].mean()
    seen = np.isin(truth, data.labels[data.rows("train", "val"), 2]) & (truth >= 0)
    assert metrics["test/accuracy_seen/genus"] == (answers == truth)[seen].mean()
    assert record["reports"][0].steps == math.ceil(68 / 8)


def test_finish_gets_the_model_alone(config, data):
    models = []
    run_trial(config(epochs=1), data, lambda result: None, finish=models.append)
    (model,) = models
    assert not model.training
    assert model.features is None
    assert model.base_logits is None


def test_a_loss_that_is_not_finite_fails_the_trial(config, data, alone):
    record = alone(config(optimizer=SGDConfig(lr=1e30), batch_size=9), data)
    assert isinstance(record["error"], TrialFailed)
    assert record["error"].reason == "train/loss is not finite at epoch 1, step 2"
    assert record["reports"] == []


def test_a_long_epoch_fails_before_its_end(config, data, alone, monkeypatch):
    monkeypatch.setattr("hiertune.train.trial.FINITE_CHECK_STEPS", 5)
    steps = []
    monkeypatch.setattr("hiertune.train.trial.learning_rate_factor", lambda *a: steps.append(1) or 1e30)
    record = alone(config(epochs=1, batch_size=2), data)
    assert record["error"].reason == "train/loss is not finite at epoch 1, step 2"
    assert len(steps) == 5


def test_a_validation_loss_that_is_not_finite_fails_the_trial(config, data, alone):
    record = alone(config(optimizer=SGDConfig(lr=1e30), batch_size=1000), data)
    assert isinstance(record["error"], TrialFailed)
    assert record["error"].reason.startswith("val/loss is ")
    assert record["error"].reason.endswith(" at epoch 1")


def test_trial_failed_pickles():
    assert pickle.loads(pickle.dumps(TrialFailed("loss is nan"))).reason == "loss is nan"


def test_a_level_without_labels_is_trained_around(config, data, alone):
    labels = data.labels.copy()
    labels[:, 1:] = -1
    blind = HierarchicalDataset(data.inputs, labels, data.ids, data.split, data.taxonomy)
    for weighting in (
        FixedConfig(weights={"domain": 1.0}),
        GradNormConfig(interval=1, initial_weights="inverse_density"),
        GradNormConfig(interval=1, at="backbone"),
        UncertaintyConfig(),
        DWAConfig(),
    ):
        record = alone(config(weighting=weighting, loss=TaxonomySmoothingConfig()), blind)
        metrics = record["outcome"].metrics
        assert metrics["train/loss/genus"] == 0.0
        assert metrics["train/loss"] == metrics["train/loss/domain"] > 0.0


@pytest.mark.parametrize(
    ("changes", "options", "word"),
    [
        ({}, {"validate_on": ("test",)}, "test split"),
        ({}, {"fit_on": ("test",)}, "test split"),
        ({"precision": "fp16"}, {}, "train.precision"),
        ({"norm": "batch", "batch_size": 1}, {}, "train.batch_size"),
        ({"weighting": FixedConfig(weights={"order": 1.0})}, {}, "order"),
        (
            {"weighting": GradNormConfig(at="backbone", exclude=ExcludeConfig(names=["layers"]))},
            {},
            "weighting.exclude: nothing is left",
        ),
    ],
)
def test_bad_input_is_said_at_once(config, make_data, alone, changes, options, word):
    record = alone(config(**changes), make_data(test=0), **options)
    assert isinstance(record["error"], InputError)
    assert word in str(record["error"])
    assert record["reports"] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_must_exist(config, data, alone):
    error = alone(config(device="cuda"), data)["error"]
    assert isinstance(error, InputError)
    assert error.key == "train.device"


def test_interrupts_come_through(config, data):
    def interrupt(result):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trial(config(), data, interrupt)
