"""What the tests of image importers share: image files, and how a data set reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hiertune.config import DataConfig
from hiertune.data import open_dataset
from hiertune.errors import InputError


@pytest.fixture
def image():
    """Write an image of noise, and return its pixels; each seed is another image."""

    def write(path: Path, seed: int = 0, size: int = 8, **options) -> np.ndarray:
        pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, **options)
        return pixels

    return write


@pytest.fixture
def open_images():
    """A data set, and all its pixels."""

    def read(path: Path):
        data = open_dataset(DataConfig(path=str(path)), require=())
        return data, data.inputs.rows(np.arange(len(data))).numpy()

    return read


@pytest.fixture
def message():
    """The message of the InputError that a call ends with."""

    def refused(function, *arguments, **options) -> str:
        with pytest.raises(InputError) as error:
            function(*arguments, **options)
        return str(error.value)

    return refused


@pytest.fixture
def paths_of():
    """Each row's lineage, None where it is unknown."""

    def read(data) -> list[tuple[str | None, ...]]:
        names = data.taxonomy.names
        return [
            tuple(None if label < 0 else names[level][label] for level, label in enumerate(row))
            for row in data.labels
        ]

    return read
