"""Images, learned as well as by a plain timm script, and better than by a network that sees no shapes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from hiertune.config import (
    AdamWConfig,
    DataConfig,
    MLPConfig,
    ModelConfig,
    TimmConfig,
    TrainConfig,
    TrialConfig,
)
from hiertune.train.loop import run_trial

pytest.importorskip("timm")

PLAIN = Path(__file__).parents[2] / "scripts" / "bench" / "_plain_images.py"


@pytest.fixture(scope="module")
def train_plain():
    spec = importlib.util.spec_from_file_location("hiertune_plain_images", PLAIN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.train_plain


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
