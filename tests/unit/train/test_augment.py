"""What a row becomes depends on seed, epoch and row alone."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from hiertune.config import AugmentConfig
from hiertune.train.augment import Augmentation

pytest.importorskip("torchvision")

EVERYTHING = {"crop_scale": [0.3, 0.9], "flip": 0.5, "color_jitter": 0.4, "erasing": 0.5}
CONFIGS = {
    "crop": {"crop_scale": [0.3, 0.9]},
    "flip": {"flip": 0.5},
    "jitter": {"color_jitter": 0.4},
    "erasing": {"erasing": 0.6},
    **{name: {"policy": name} for name in ("rand_augment", "trivial_augment", "auto_augment")},
    "everything": {**EVERYTHING, "policy": "rand_augment"},
}
ROWS = np.arange(12)
IMAGES = torch.randint(0, 256, (12, 10, 14, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def augmented(config, rows=ROWS, epoch=1, seed=0, images=IMAGES, size=8, threads=1):
    return Augmentation(AugmentConfig(**config), seed, size, threads).of_epoch(epoch)(images[rows], rows)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_same_row_same_change_whatever_the_batch_the_thread_and_the_global_state(config):
    torch.manual_seed(1)
    whole = augmented(config)
    assert whole.dtype == torch.uint8
    torch.manual_seed(2)
    state = torch.get_rng_state()
    torch.testing.assert_close(augmented(config, np.array([7, 3])), whole[[7, 3]], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(augmented(config, threads=3), whole)
    of_thread = []
    thread = threading.Thread(target=lambda: of_thread.append(augmented(config)))
    thread.start()
    while thread.is_alive():
        torch.rand(3)  # draws of the training, meanwhile
    thread.join()
    assert torch.equal(of_thread[0], whole)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_rows_epochs_and_seeds_differ(config):
    same = IMAGES[:1].expand(12, -1, -1, -1)
    first = augmented(config, images=same)
    assert len({tuple(image.flatten().tolist()) for image in first}) > 1
    assert not torch.equal(augmented(config, images=same, epoch=2), first)
    assert not torch.equal(augmented(config, images=same, seed=1), first)


def test_draws_of_the_training_are_not_disturbed():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    augmented(CONFIGS["everything"])
    assert torch.equal(torch.rand(4), expected)


def test_flip_mirrors_left_and_right():
    assert torch.equal(augmented({"flip": 1.0}), IMAGES.flip(2))


def test_crops_get_the_image_size_but_are_never_enlarged():
    assert augmented({"crop_scale": [0.5, 0.5]}, size=8).shape == (12, 8, 8, 3)
    assert augmented({"crop_scale": [0.5, 0.5]}, size=12).shape == (12, 10, 12, 3)
    assert augmented({"flip": 0.5}, size=8).shape == IMAGES.shape


def test_a_worker_without_rows():
    assert augmented(CONFIGS["everything"], np.array([], np.int64)).shape == (0, 8, 8, 3)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_channels(channels):
    given = IMAGES[..., :1].expand(-1, -1, -1, channels)
    config = {"crop_scale": [0.3, 0.9], "flip": 0.5, "erasing": 0.5}
    if channels == 1:
        config |= {"color_jitter": 0.4, "policy": "rand_augment"}
    assert augmented(config, images=given).shape == (12, 8, 8, channels)
