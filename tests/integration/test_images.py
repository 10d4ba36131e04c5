"""Images, learned as well as by a plain timm script, and better than by a network that sees no shapes."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch

from hiertune.config import (
    AdamWConfig,
    DataConfig,
    MLPConfig,
    ModelConfig,
    TimmConfig,
    TrainConfig,
    TrialConfig,
)
from hiertune.data import write_dataset
from hiertune.train.loop import run_trial

pytest.importorskip("timm")


@pytest.fixture(scope="module")
def train_plain(bench_module):
    return bench_module("_plain_images").train_plain


def settings(backbone, epochs, lr):
    return TrialConfig(
        data=DataConfig(path="generated"),
        model=ModelConfig(backbone=backbone),
        optimizer=AdamWConfig(lr=lr),
        train=TrainConfig(epochs=epochs, batch_size=64, device="cpu"),
    )


@pytest.mark.slow
def test_as_good_as_a_plain_script_and_better_than_without_shapes(shape_images, train_plain):
    data = shape_images(2400)
    # seeds mean other initial weights in the two: the accuracies meet where both have learned it
    config = settings(TimmConfig(name="test_resnet", image_size=32), 7, 3e-3)
    ours = run_trial(config, data, lambda result: None).metrics["val/accuracy/colour"]
    flat = settings(MLPConfig(hidden=[256]), 20, 1e-3)
    without = run_trial(flat, data, lambda result: None).metrics["val/accuracy/colour"]
    assert ours == pytest.approx(train_plain(config, data), abs=0.02)
    assert ours > without + 0.2
    assert without > 0.3  # colour alone


def test_the_mean_colour_of_an_image_tells_nothing(shape_images):
    data = shape_images(540)
    means = data.inputs.tensor.double().mean((1, 2))
    assert (means - 127).abs().max() < 3
    of_class = [means[data.labels[:, 2] == c].mean(0) for c in range(data.taxonomy.num_classes[2])]
    assert all((mean - means.mean(0)).abs().max() < 0.5 for mean in of_class)


SPACE = """
name: shapes
data: {path: images.h5}
model:
  backbone: {kind: timm, name: test_resnet, weights: body.pth, image_size: 32, frozen: true, hidden: [32]}
  head: {choice: [{kind: linear}, {kind: path_softmax}]}
loss: {kind: cross_entropy}
optimizer: {kind: adamw, lr: {loguniform: [3.0e-3, 3.0e-2]}}
train: {epochs: 4, batch_size: 64}
search: {trials: 3, workers_per_trial: 2, scheduler: {kind: none}, sampler: {kind: random}}
"""


@pytest.mark.slow
def test_a_search_on_a_frozen_backbone_computes_its_features_once(
    hiertune, shape_images, tmp_path, monkeypatch
):
    import timm
    from PIL import Image

    data = shape_images(500)
    images = data.inputs.tensor.numpy()
    write_dataset(tmp_path / "images.h5", images, data.labels, data.taxonomy, data.ids, data.split)
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "body.pth")
    (tmp_path / "space.yaml").write_text(SPACE)
    monkeypatch.setenv("HIERTUNE_CACHE", str(tmp_path / "cache"))
    done = hiertune("search", "space.yaml", capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "cache" / "features").glob("*.safetensors"))) == 1
    summary = json.loads((tmp_path / "runs" / "shapes" / "summary.json").read_text())
    assert summary["trials"] == {"completed": 3}
    assert {"flat", "flat_crm"} == set(summary["controls"])

    # the model that is left names image files, with neither the weights file nor the cache
    (tmp_path / "body.pth").unlink()
    (tmp_path / "photos").mkdir()
    rows = data.rows("test")
    for row in rows:
        Image.fromarray(images[row]).save(tmp_path / "photos" / f"{row:04}.png")
    assert hiertune("predict", "runs/shapes/model", "photos", "--out", "names.csv").returncode == 0
    names = pd.read_csv(tmp_path / "names.csv")
    finest = data.levels[-1]
    truth = [data.taxonomy.names[-1][label] for label in data.labels[rows, -1]]
    right = np.mean(names[finest] == truth)
    assert right == pytest.approx(summary["winner"]["metrics"][f"test/accuracy/{finest}"], abs=1e-9)
