"""Training on images: cached features of frozen backbones, against a plain timm script, waiting for input.

Generated images, CPU, one thread. `images.py [--quick]` prints a table, and as its last line one JSON
object: {"figures": {...}, "targets": {...}}. (a) trials on a frozen backbone, one after another as in a
search: the first computes the features, against all on the images; (b) the same settings in a plain
script; (c) the share of an epoch that waits for its input.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _bench import Figure, ratio, seconds, show
from _plain_images import train_plain
from _shapes import shape_images

from hiertune.config import (
    AdamWConfig,
    AugmentConfig,
    DataConfig,
    MLPConfig,
    ModelConfig,
    TimmConfig,
    TrainConfig,
    TrialConfig,
)
from hiertune.data import HierarchicalDataset, open_dataset, write_dataset
from hiertune.train import build
from hiertune.train.loop import run_trial
from hiertune.train.result import EpochResult

NAME, SIZE = "test_resnet", 32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer images and epochs: a look, not a result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = shape_images(800 if options.quick else 2400)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HIERTUNE_CACHE"] = folder
        figures = [
            *frozen(data, trials=2 if options.quick else 4, epochs=4 if options.quick else 10),
            *against_plain(data, epochs=2 if options.quick else 6, rounds=3 if options.quick else 9),
            *waiting(data, Path(folder)),
        ]
    show(f"{len(data)} images of {SIZE}x{SIZE}, {NAME}", figures)


def frozen(data: HierarchicalDataset, trials: int, epochs: int) -> list[Figure]:
    """The same trials, which differ in the learning rate, with and without cached features, in turns."""
    backbone = TimmConfig(name=NAME, image_size=2 * SIZE, frozen=True)
    configs = [config(backbone, epochs, lr=10 ** -(2 + n / 4)) for n in range(trials)]
    cached = uncached = 0.0
    decide = build.uses_fixed_features
    for one in configs:
        cached += seconds(partial(run, one, data))
        build.uses_fixed_features = lambda config: False
        uncached += seconds(partial(run, one, data))
        build.uses_fixed_features = decide
    name = f"{trials} trials of {epochs} epochs, frozen: uncached / cached"
    return [
        Figure("frozen, cached features", cached, unit="s"),
        Figure("frozen, images every epoch", uncached, unit="s"),
        Figure(name, uncached / cached, None if trials < 4 else 10, "above"),
    ]


def against_plain(data: HierarchicalDataset, epochs: int, rounds: int) -> list[Figure]:
    """Accuracies after all epochs; times of a single one, in turns."""
    backbone = TimmConfig(name=NAME, image_size=SIZE)
    settings, short = config(backbone, epochs, lr=3e-3), config(backbone, 1, lr=3e-3)
    flat = config(MLPConfig(hidden=[256]), 3 * epochs, lr=1e-3)
    finest = "val/accuracy/colour"
    times = ratio(partial(run, short, data), partial(train_plain, short, data), rounds=rounds, warmup=1)
    return [
        Figure(
            "accuracy of the colour of a shape, hiertune", run(settings, data)[-1].metrics[finest], unit=""
        ),
        Figure("the same, plain timm script", train_plain(settings, data), unit=""),
        Figure("the same, flattened into an MLP", run(flat, data)[-1].metrics[finest], unit=""),
        Figure("time: hiertune / plain timm script", times, 1.15),
    ]


def waiting(data: HierarchicalDataset, folder: Path) -> list[Figure]:
    images = data.inputs.rows(np.arange(len(data))).numpy()
    path = write_dataset(folder / "images.h5", images, data.labels, data.taxonomy, data.ids, data.split)
    lazy = open_dataset(DataConfig(path=str(path), in_memory="never"))
    plain = TimmConfig(name=NAME, image_size=SIZE)
    augment = AugmentConfig(crop_scale=(0.5, 1.0), flip=0.5, policy="rand_augment")
    changed = plain.model_copy(update={"augment": augment})
    return [
        Figure(
            f"share of an epoch that waits for its input, {name}", share_waiting(backbone, source), unit=""
        )
        for name, backbone, source in (
            ("in memory", plain, data),
            ("read lazily", plain, lazy),
            ("augmented", changed, data),
        )
    ]


def share_waiting(backbone: TimmConfig, data: HierarchicalDataset) -> float:
    results = run(config(backbone, 2, lr=1e-3), data)
    return results[-1].input_seconds / results[-1].seconds


def config(backbone: TimmConfig | MLPConfig, epochs: int, lr: float) -> TrialConfig:
    return TrialConfig(
        data=DataConfig(path="generated"),
        model=ModelConfig(backbone=backbone),
        optimizer=AdamWConfig(lr=lr),
        train=TrainConfig(epochs=epochs, batch_size=64, device="cpu"),
    )


def run(settings: TrialConfig, data: HierarchicalDataset) -> list[EpochResult]:
    results: list[EpochResult] = []
    run_trial(settings, data, results.append)
    return results


if __name__ == "__main__":
    main()
