"""Small data sets that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hiertune.data.format import write_dataset
from hiertune.taxonomy import Taxonomy

LEVELS = ("order", "genus")
LINEAGES = [
    ("A", "x"),
    ("A", "y"),
    ("B", "z"),
    ("B", None),
    (None, "w"),  # an orphan
    ("A", "x"),
    (None, None),
    ("B", "z"),
]
SPLIT = np.array([0, 0, 0, 0, 1, 1, 2, 2], np.int8)


@pytest.fixture
def taxonomy() -> Taxonomy:
    return Taxonomy.from_lineages(LINEAGES, LEVELS)


@pytest.fixture
def inputs() -> np.ndarray:
    return np.arange(24, dtype=np.float32).reshape(8, 3) / 7


@pytest.fixture
def ids() -> list[str]:
    return [f"row {i} ä" for i in range(8)]


@pytest.fixture
def good(tmp_path: Path, inputs, taxonomy, ids) -> Path:
    """A file of 8 rows, 3 features, 2 orders and 4 genera."""
    return write_dataset(tmp_path / "good.h5", inputs, taxonomy.encode(LINEAGES), taxonomy, ids, SPLIT)


@pytest.fixture(scope="session")
def builtin_cache(tmp_path_factory) -> Path:
    """A cache folder that is empty at first; the tests that use it set HIERTUNE_CACHE to it."""
    return tmp_path_factory.mktemp("cache")
