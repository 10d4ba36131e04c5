"""Settings that all tests share, and generated images."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

# Two processes of one compute thread each are faster than one of two, and small layers suffer most.
torch.set_num_threads(1)

_BENCH = Path(__file__).parents[1] / "scripts" / "bench"


@pytest.fixture(scope="session")
def bench_module():
    """`bench_module(name)`: a module of the benchmarks, which are no package."""

    def load(name):
        spec = importlib.util.spec_from_file_location(f"hiertune_bench{name}", _BENCH / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # its dataclasses look for it there
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def shape_images(bench_module):
    """`shape_images(rows, size, seed)`: the data set of the image benchmark."""
    return bench_module("_shapes").shape_images
