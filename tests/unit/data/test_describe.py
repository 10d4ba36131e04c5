from __future__ import annotations

import json

import h5py
import numpy as np
import pytest
from rich.console import Console

from hiertune.config import DataConfig
from hiertune.data import describe, open_dataset
from hiertune.data.describe import LevelDescription
from hiertune.errors import InputError


def test_description(good):
    # order: A A B B - | A, then -, B; genus: x y z - | w, x, then -, z; the first four rows are train
    description = describe(good)
    one_each = {"val": 1, "test": 1}
    assert description.source == str(good)
    assert description.rows == {"train": 4, "val": 2, "test": 2}
    assert description.input_shape == (3,)
    assert description.input_type == "float32"
    assert description.input_bytes == 8 * 3 * 4
    assert description.levels == (
        LevelDescription("order", 2, 6 / 8, 1.0, trained=2, singletons=0, orphans=0, seen=one_each),
        LevelDescription("genus", 4, 6 / 8, 3 / 4, trained=3, singletons=2, orphans=1, seen=one_each),
    )
    data = open_dataset(DataConfig(path=str(good)))
    assert description.fingerprint == data.fingerprint
    assert describe(data) == description


def test_description_is_json(good):
    content = json.loads(json.dumps(describe(good).to_dict()))
    assert content["rows"] == {"train": 4, "val": 2, "test": 2}
    assert content["levels"][1]["seen"] == {"val": 1, "test": 1}


def test_rich_shows_every_figure(good):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(describe(good))
    text = console.export_text()
    lines = [line.split() for line in text.splitlines()]
    assert ["order", "2", "75.0%", "100.0%", "2", "0", "0"] in lines
    assert ["genus", "4", "75.0%", "75.0%", "3", "2", "1"] in lines
    assert "8 rows: train 4, val 2, test 2" in text
    assert "val: 1 of 2 rows have a genus with training rows" in text
    assert "inputs: 3 float32" in text


def test_a_file_without_training_rows_can_be_described(good):
    with h5py.File(good, "r+") as file:
        file["split"][...] = np.full(8, 2)
    assert describe(good).levels[0].trained == 0
    assert describe(good).levels[0].density == 0.0


def test_a_class_without_rows_is_no_singleton(good):
    with h5py.File(good, "r+") as file:
        file["labels"][4, 1] = -1  # the only row of "w"
    assert describe(good).levels[1].singletons == 1
    assert describe(good).levels[1].classes == 4


def test_a_bad_file_is_bad_input(tmp_path):
    with pytest.raises(InputError, match="there is no such file"):
        describe(tmp_path / "a.h5")


def test_inputs_are_not_read_into_memory(good, monkeypatch):
    expected = describe(good)
    monkeypatch.delattr("hiertune.data.dataset.Hdf5Inputs.read_all")
    assert describe(good) == expected


def test_a_path_is_no_markup(good, tmp_path):
    name = "[red]a\x1b[0m.h5"
    good.rename(tmp_path / name)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(describe(tmp_path / name))
    assert r"[red]a\x1b[0m.h5" in console.export_text()
