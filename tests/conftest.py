"""Settings that all tests share, and generated images."""

import importlib.util
from pathlib import Path

import pytest
import torch

# Two processes of one compute thread each are faster than one of two, and small layers suffer most.
torch.set_num_threads(1)

_SHAPES = Path(__file__).parents[1] / "scripts" / "bench" / "_shapes.py"


@pytest.fixture(scope="session")
def shape_images():
    """`shape_images(rows, size, seed)`: the data set of the image benchmark."""
    spec = importlib.util.spec_from_file_location("hiertune_shapes", _SHAPES)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.shape_images
