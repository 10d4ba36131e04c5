"""A small data set with gaps, and ways to run a trial: here, or with two workers."""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hiertune
from hiertune.config import (
    ConstantConfig,
    DataConfig,
    MLPConfig,
    ModelConfig,
    SGDConfig,
    TrainConfig,
    TrialConfig,
)
from hiertune.data import HierarchicalDataset, MemoryInputs
from hiertune.taxonomy import Taxonomy

WORKER = Path(__file__).with_name("worker.py")

_spec = importlib.util.spec_from_file_location("hiertune_test_worker", WORKER)
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)

TAXONOMY = Taxonomy.from_parents(
    ["domain", "family", "genus"], [[-1, -1], [0, 0, 1, -1], [0, 0, 1, 2, 2, 3, -1]]
)


def _data(train=45, val=23, test=19, seed=0, features=6) -> HierarchicalDataset:
    """Clusters of features, one per genus; some labels unknown, a genus and a family without parent."""
    random = np.random.default_rng(seed)
    rows = train + val + test
    genus = random.integers(0, 7, rows)
    labels = TAXONOMY.ancestors("genus")[genus].copy()
    inputs = 2 * random.normal(size=(7, features))[genus] + random.normal(size=(rows, features))
    labels[random.random(rows) < 0.2, 2] = -1
    labels[random.random(rows) < 0.1] = -1
    split = random.permutation(np.repeat([0, 1, 2], [train, val, test]).astype(np.int8))
    ids = np.array([f"row{i}" for i in range(rows)], dtype=object)
    return HierarchicalDataset(MemoryInputs(torch.from_numpy(inputs).float()), labels, ids, split, TAXONOMY)


def _config(**changes) -> TrialConfig:
    """A small trial. Keys of `train` and of the MLP may be given flat, sections as configs."""
    train = {name: changes.pop(name) for name in list(changes) if name in TrainConfig.model_fields}
    mlp = {name: changes.pop(name) for name in list(changes) if name in MLPConfig.model_fields}
    head = {"head": changes.pop("head")} if "head" in changes else {}
    sections = {
        "model": ModelConfig(backbone=MLPConfig(**{"hidden": [12], **mlp}), **head),
        "optimizer": SGDConfig(lr=0.05),
        "schedule": ConstantConfig(),
        "train": TrainConfig(**{"epochs": 3, "batch_size": 8, "device": "cpu", **train}),
    }
    return TrialConfig(data=DataConfig(path="synthetic"), **{**sections, **changes})


class Pair:
    """Two worker processes that train one trial after another."""

    def __init__(self, folder: Path) -> None:
        root = Path(hiertune.__file__).parents[1]
        loopback = {} if sys.platform == "darwin" else {"GLOO_SOCKET_IFNAME": "lo"}
        environment = {**os.environ, "PYTHONPATH": str(root), **loopback}
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(WORKER), str(folder / "store"), str(rank), "2"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
            for rank in range(2)
        ]

    def __call__(self, config, data, **options) -> list[dict]:
        """The record of each rank."""
        for process in self.processes:
            pickle.dump((config, data, options), process.stdin)
            process.stdin.flush()
        return [pickle.load(process.stdout) for process in self.processes]

    def close(self) -> None:
        for process in self.processes:
            pickle.dump(None, process.stdin)
            process.stdin.close()
        for process in self.processes:
            process.wait(30)
            process.stdout.close()


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.close()


@pytest.fixture
def alone():
    return worker.record


@pytest.fixture(scope="session")
def make_data():
    return _data


@pytest.fixture
def config():
    return _config
