from __future__ import annotations

import gc
import weakref

import numpy as np
import torch

from hiertune.data import HierarchicalDataset, MemoryInputs
from hiertune.train import standardize
from hiertune.train.standardize import standardization


def dataset(inputs, split):
    rows = len(inputs)
    return HierarchicalDataset(
        MemoryInputs(inputs), np.zeros((rows, 1), int), np.arange(rows).astype(object), split, None
    )


def test_equals_numpy_over_the_chosen_rows(monkeypatch):
    monkeypatch.setattr(standardize, "_BLOCK_ROWS", 16)
    inputs = torch.randn(100, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1000
    split = (np.arange(100) % 3).astype(np.int8)
    data = dataset(inputs, split)
    for splits, wanted in ((("train",), split == 0), (("train", "val"), split < 2)):
        mean, std = standardization(data, splits)
        rows = inputs.numpy().astype(np.float64)[wanted]
        np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(std, rows.std(0), rtol=1e-9)


def test_constant_inputs_have_deviation_zero():
    mean, std = standardization(dataset(torch.full((30, 2), 0.1), np.zeros(30, np.int8)), ("train",))
    assert std.tolist() == [0.0, 0.0]
    assert mean.tolist() == [torch.tensor(0.1).item()] * 2


def test_images_are_flattened():
    inputs = torch.randint(0, 256, (10, 2, 3, 1), dtype=torch.uint8)
    mean, _ = standardization(dataset(inputs, np.zeros(10, np.int8)), ("train",))
    torch.testing.assert_close(mean, inputs.flatten(1).double().mean(0))


def test_measured_once_and_dropped_with_the_data(monkeypatch):
    data = dataset(torch.randn(10, 2), np.zeros(10, np.int8))
    first = standardization(data, ("train",))
    monkeypatch.setattr(data.inputs, "rows", None)
    assert standardization(data, ("train",)) is first
    alive = weakref.ref(data)
    del data
    gc.collect()
    assert alive() is None
