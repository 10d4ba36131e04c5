"""Image backbones in training: two workers against one, precision, resuming, freezing."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from hiertune.config import (
    AdamWConfig,
    AugmentConfig,
    CutmixConfig,
    GradNormConfig,
    MixupConfig,
    ModelConfig,
    SGDConfig,
    TimmConfig,
)
from hiertune.data import open_dataset, write_dataset
from hiertune.data.dataset import DataConfig
from hiertune.errors import InputError
from hiertune.export import load_model, predict_file, save_trained
from hiertune.models import build_model
from hiertune.models.timm_backbone import TimmBackbone
from hiertune.train import features
from hiertune.train.batches import BatchPlan
from hiertune.train.build import augmentation_of, check_batches, plan_of
from hiertune.train.checkpoint import Checkpoint, decode_checkpoint
from hiertune.train.loop import run_trial
from hiertune.train.workers import Workers

pytest.importorskip("timm")

SIZE = 32


@pytest.fixture(scope="module")
def data(shape_images):
    return shape_images(70, size=16)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("HIERTUNE_CACHE", str(folder))
    features._known.clear()
    return folder


@pytest.fixture
def timm_config(config):
    def build(name="test_resnet", backbone=None, **changes):
        settings = TimmConfig(name=name, **{"image_size": SIZE, **(backbone or {})})
        defaults = {"epochs": 1, "batch_size": 16, "optimizer": SGDConfig(lr=1e-3)}
        return config(**{**defaults, "model": ModelConfig(backbone=settings), **changes})

    return build


def same_on_both(records):
    first, second = records
    assert first["error"] is None, first["error"]
    assert [(r.epoch, r.metrics, r.input_seconds) for r in first["reports"]] == [
        (r.epoch, r.metrics, r.input_seconds) for r in second["reports"]
    ]
    return first


AUGMENT = {"crop_scale": [0.5, 1.0], "flip": 0.5, "policy": "rand_augment"}
CASES = {
    "batch norm": ("test_resnet", {}, {}),
    "batch norm with activation": ("test_efficientnet", {"image_size": 64}, {}),
    "attention, augmentation, layer decay": (
        "test_vit",
        {"augment": AUGMENT},
        {"optimizer": SGDConfig(lr=1e-3, layer_decay=0.7)},
    ),
    "frozen, gradnorm at its hidden layer": (
        "test_resnet",
        {"frozen": True, "hidden": [8], "augment": AUGMENT},
        {"weighting": GradNormConfig(interval=1, at="last_layer")},
    ),
    "cutmix of cropped images, accumulated": (
        "test_resnet",
        {"augment": AUGMENT, "image_size": 12},
        {"mix": CutmixConfig(min_group_size=2), "accumulation": 2},
    ),
    "mixup, gradnorm at the backbone": (
        "test_resnet",
        {},
        {"mix": MixupConfig(min_group_size=2), "weighting": GradNormConfig(interval=1, at="backbone")},
    ),
    "cached features": ("test_resnet", {"frozen": True}, {"weighting": GradNormConfig(interval=1)}),
}


@pytest.mark.parametrize("case", CASES)
def test_two_workers_agree_with_one(case, timm_config, data, alone, pair):
    name, backbone, changes = CASES[case]
    settings = timm_config(name, backbone, **changes)
    one = alone(settings, data)
    two = same_on_both(pair(settings, data))
    for of_one, of_two in zip(one["reports"], two["reports"], strict=True):
        assert of_two.metrics == pytest.approx(of_one.metrics, rel=1e-3, abs=1e-5)
    for key, value in one["parameters"].items():
        torch.testing.assert_close(two["parameters"][key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["test_convnext", "test_vit"])
def test_workers_without_rows(timm_config, shape_images, alone, pair, name):
    few = shape_images(8, size=16)
    settings = timm_config(name, batch_size=1)
    one, two = alone(settings, few), same_on_both(pair(settings, few))
    assert two["outcome"].metrics == pytest.approx(one["outcome"].metrics, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "workers", "fits"),
    [("test_coatnet", 2, True), ("test_coatnet", 3, False), ("test_resnet", 3, True), ("test_vit", 3, True)],
)
def test_attention_with_batch_norm_cannot_do_without_rows(data, name, workers, fits):
    """Attention needs a row, and batch norm forbids to add one."""
    settings = ModelConfig(backbone=TimmConfig(name=name, image_size=64))
    model = build_model(settings, data.taxonomy, data.inputs.shape[1:], None)
    plan = BatchPlan(data.inputs, np.arange(34), 8, 0)  # the last batch has two rows
    if fits:
        check_batches(model, plan, Workers(0, workers))
        return
    with pytest.raises(InputError, match="smallest batch has 2 rows for 3 workers"):
        check_batches(model, plan, Workers(0, workers))
    assert model.training


def test_boxes_of_cutmix_are_of_cropped_images(timm_config, data):
    """A share of the area is one of what is pasted: of the images as they are after augmentation."""
    settings = timm_config(
        backbone={"augment": AUGMENT, "image_size": 12}, mix=CutmixConfig(min_group_size=2)
    )
    rows = data.rows("train")
    (step, *_) = plan_of(settings, data, data.inputs, rows, augmentation_of(settings)).epoch(1)
    mix = step.passes[0].mix
    read = torch.cat(
        [torch.zeros(len(step.passes[0].rows), 12, 12, 1), torch.ones(len(mix.partners), 12, 12, 1)]
    )
    pasted = mix.inputs(read)[mix.positions]
    assert pasted.mean((1, 2, 3)).tolist() == pytest.approx([1 - mix.share] * len(mix.partners))


@pytest.mark.parametrize(("batch_size", "largest"), [(20, 40), (4, 32)])
def test_images_are_evaluated_in_batches_near_those_of_training(
    timm_config, data, alone, monkeypatch, batch_size, largest
):
    sizes, pooled = [], TimmBackbone.pooled

    def watched(backbone, images):
        if not backbone.training:
            sizes.append(len(images))
        return pooled(backbone, images)

    monkeypatch.setattr(TimmBackbone, "pooled", watched)
    alone(timm_config(batch_size=batch_size), data, validate_on=(), test_on=("train",))
    assert max(sizes) == largest
    assert sum(sizes) == len(data.rows("train"))


def numbers(record):
    assert record["error"] is None, record["error"]
    return [(r.epoch, r.metrics) for r in record["reports"]]


def test_bit_identical_and_when_resumed_with_everything_on(timm_config, data, alone, tmp_path):
    augment = AugmentConfig(flip=0.5, erasing=0.5, color_jitter=0.3)
    backbone = {"dropout": 0.2, "drop_path": 0.2, "augment": augment}
    optimizer = AdamWConfig(lr=1e-3, layer_decay=0.8)
    settings = timm_config("test_vit", backbone, epochs=2, optimizer=optimizer, precision="bf16")
    torch.manual_seed(7)
    whole = numbers(alone(settings, data))
    alone(settings, data, checkpoint=tmp_path / "checkpoint", stop_at=1)
    torch.manual_seed(8)
    assert numbers(alone(settings, data, checkpoint=tmp_path / "checkpoint")) == whole[1:]


def test_lazily_read_images_train_bit_identically(timm_config, data, alone, tmp_path):
    path = write_dataset(
        tmp_path / "images.h5", data.inputs.tensor.numpy(), data.labels, data.taxonomy, data.ids, data.split
    )
    lazy = open_dataset(DataConfig(path=str(path), in_memory="never"))
    settings = timm_config()
    record = alone(settings, lazy)
    assert numbers(record) == numbers(alone(settings, data))
    (result,) = record["reports"]
    assert 0 < result.input_seconds < result.seconds


def test_the_reported_rate_is_that_of_the_heads(timm_config, data, alone):
    record = alone(timm_config(optimizer=SGDConfig(lr=1e-3, layer_decay=0.5)), data)
    assert record["outcome"].metrics["lr"] == 1e-3


def test_bf16_is_near_fp32(timm_config, data, alone):
    exact, near = (
        alone(timm_config("test_vit", precision=precision), data)["outcome"].metrics["train/loss"]
        for precision in ("fp32", "bf16")
    )
    assert near != exact
    assert near == pytest.approx(exact, rel=0.02)


# ----------------------------------------------------------------------------- frozen backbones


def test_frozen_trains_only_what_follows(timm_config, data, alone):
    backbone = {"frozen": True, "hidden": [8], "augment": AugmentConfig(flip=0.5)}
    settings = timm_config(backbone=backbone, optimizer=SGDConfig(lr=0.1, weight_decay=0.1))
    torch.manual_seed(settings.train.seed)
    before = build_model(settings.model, data.taxonomy, (16, 16, 3), None).state_dict()
    after = alone(settings, data)["parameters"]
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith(("backbone.body.", "backbone.pixels."))}


def images_seen(monkeypatch):
    """How many images the backbone has made features of."""
    seen = []
    plain = features.TimmBackbone.pooled
    monkeypatch.setattr(
        features.TimmBackbone, "pooled", lambda self, images: seen.append(len(images)) or plain(self, images)
    )
    return seen


def test_features_are_computed_once(timm_config, data, alone, cache, monkeypatch):
    seen = images_seen(monkeypatch)
    settings = timm_config(backbone={"frozen": True}, epochs=3)
    first = numbers(alone(settings, data))
    assert sum(seen) == len(data)
    (file,) = cache.glob("features/*.safetensors")
    other = timm_config(backbone={"frozen": True, "hidden": [8], "dropout": 0.1}, epochs=1)
    file.unlink()
    numbers(alone(other, data))  # nor is it read again by the same process
    assert sum(seen) == len(data)
    features._known.clear()
    assert numbers(alone(settings, data)) == first
    assert sum(seen) == 2 * len(data)
    features._known.clear()
    assert numbers(alone(settings, data)) == first  # from the file
    assert sum(seen) == 2 * len(data)


def test_of_those_that_want_features_at_once_one_computes_them(timm_config, data, monkeypatch):
    seen = images_seen(monkeypatch)
    settings = timm_config(backbone={"frozen": True}).model.backbone
    torch.manual_seed(0)
    backbone = features.TimmBackbone((16, 16, 3), settings)
    found = []

    def work(own):
        args = (backbone, "fp32", torch.device("cpu"), nullcontext())
        found.append(features.fixed_features(own, *args).tensor)

    threads = [threading.Thread(target=work, args=(replace(data),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(seen) == len(data)
    assert all(torch.equal(of_thread, found[0]) for of_thread in found)
    with torch.no_grad():
        expected = backbone.pooled(data.inputs.tensor)
    torch.testing.assert_close(found[0], expected)


def test_a_cache_folder_that_cannot_be_written(timm_config, data, alone, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HIERTUNE_CACHE", str(tmp_path / "file"))
    error = alone(timm_config(backbone={"frozen": True}), data)["error"]
    assert isinstance(error, InputError)
    assert "HIERTUNE_CACHE" in error.allowed


def test_a_damaged_file_of_features_is_made_again(timm_config, data, alone, cache, monkeypatch):
    settings = timm_config(backbone={"frozen": True})
    first = numbers(alone(settings, data))
    (file,) = cache.glob("features/*.safetensors")
    whole = file.read_bytes()
    for damaged in (whole[:-5], whole[:-5] + bytes(5), b"", b"no tensors"):
        features._known.clear()
        file.unlink()
        file.write_bytes(damaged)
        assert numbers(alone(settings, data)) == first
        assert file.read_bytes() == whole


def test_cached_features_train_as_images_do(timm_config, data, alone, monkeypatch):
    settings = timm_config(backbone={"frozen": True, "hidden": [8]}, epochs=2, optimizer=SGDConfig(lr=0.05))
    cached = alone(settings, data)["outcome"].metrics
    monkeypatch.setattr("hiertune.train.build.uses_fixed_features", lambda config: False)
    assert cached == pytest.approx(alone(settings, data)["outcome"].metrics, rel=1e-4)


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},  # other weights
        {"precision": "bf16"},
        {"backbone": {"frozen": True, "image_size": 64}},
        {"backbone": {"frozen": True, "channels_last": False}},
    ],
)
def test_other_features_have_a_file_of_their_own(timm_config, data, alone, cache, other):
    numbers(alone(timm_config(backbone={"frozen": True}), data))
    numbers(alone(timm_config(**{"backbone": {"frozen": True}, **other}), data))
    assert len(list(cache.glob("features/*.safetensors"))) == 2


def test_which_trials_use_fixed_features(timm_config):
    frozen = {"frozen": True}
    assert features.uses_fixed_features(timm_config(backbone=frozen))
    assert features.uses_fixed_features(timm_config(backbone=frozen, mix=MixupConfig()))
    assert not features.uses_fixed_features(timm_config(backbone=frozen, mix=CutmixConfig()))
    assert not features.uses_fixed_features(timm_config())
    flipped = {"frozen": True, "augment": AugmentConfig(flip=0.1)}
    assert not features.uses_fixed_features(timm_config(backbone=flipped))


@pytest.mark.parametrize("frozen", [False, True])
def test_exported_models_predict_from_images(timm_config, data, tmp_path, frozen, monkeypatch):
    weights = tmp_path / "weights.pth"
    torch.manual_seed(3)
    import timm

    torch.save(timm.create_model("test_vit_relpos", img_size=SIZE).state_dict(), weights)
    settings = timm_config("test_vit_relpos", {"frozen": frozen, "weights": str(weights)})
    models = []

    def finish(model):
        save_trained(tmp_path / "model", model, settings, data)
        models.append(model)

    run_trial(settings, data, lambda result: None, finish=finish)
    weights.unlink()  # the exported model needs neither it nor a network
    predictor = load_model(tmp_path / "model")
    images = data.inputs.tensor[:10]
    with torch.no_grad():
        expected = models[0](images)
    for level, probabilities in predictor.probabilities(images).items():
        torch.testing.assert_close(torch.from_numpy(probabilities), expected[level].softmax(1))


def test_image_files_are_named_as_their_pixels_are(timm_config, data, tmp_path, alone):
    from PIL import Image

    settings = timm_config()
    run_trial(
        settings,
        data,
        lambda result: None,
        finish=lambda model: save_trained(tmp_path / "model", model, settings, data),
    )
    (tmp_path / "photos" / "below").mkdir(parents=True)
    for number, name in enumerate(["b.png", "a.png", "below/c.PNG"]):
        Image.fromarray(data.inputs.tensor[number].numpy()).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    predict_file(tmp_path / "model", tmp_path / "photos", tmp_path / "names.csv")
    names = pd.read_csv(tmp_path / "names.csv")
    assert names["id"].tolist() == ["a.png", "b.png", "below/c.PNG"]
    expected = load_model(tmp_path / "model").predict(data.inputs.tensor[[1, 0, 2]])
    assert list(names[list(data.levels)].itertuples(index=False, name=None)) == expected.names
    predict_file(tmp_path / "model", tmp_path / "photos" / "b.png", tmp_path / "one.csv")
    assert pd.read_csv(tmp_path / "one.csv")["id"].tolist() == ["b.png"]
    with pytest.raises(InputError, match="has no images"):
        predict_file(tmp_path / "model", tmp_path / "model")


def test_a_checkpoint_has_nothing_of_a_frozen_body_and_knows_its_weights_by_content(
    timm_config, data, alone, tmp_path
):
    import timm

    torch.manual_seed(3)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "a.pth")
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "c.pth")

    def settings(name):
        backbone = {"frozen": True, "hidden": [8], "weights": str(tmp_path / name)}
        return timm_config(backbone=backbone, epochs=2)

    whole = numbers(alone(settings("a.pth"), data))
    alone(settings("a.pth"), data, checkpoint=tmp_path / "checkpoint", stop_at=1)
    saved = decode_checkpoint(Checkpoint(tmp_path / "checkpoint").read()[0])
    assert {name.split(".")[1] for name in saved["model"]} == {"layers", "linear", "pixels"}
    (tmp_path / "a.pth").rename(tmp_path / "b.pth")
    assert isinstance(alone(settings("c.pth"), data, checkpoint=tmp_path / "checkpoint")["error"], InputError)
    assert numbers(alone(settings("b.pth"), data, checkpoint=tmp_path / "checkpoint")) == whole[1:]
