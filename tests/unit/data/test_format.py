"""The format round trip, and every way in which a file can be bad."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from hiertune.config import DataConfig
from hiertune.data import format as data_format
from hiertune.data import open_dataset, split_of_ids, write_dataset
from hiertune.data.format import RowBlocks, block_rows, read_contents
from hiertune.errors import InputError
from hiertune.taxonomy import Taxonomy

from .conftest import LINEAGES, SPLIT


def open_file(path: Path, **options):
    return open_dataset(DataConfig(path=str(path), **options), require=())


def first_line(path: Path, **options) -> str:
    """First line of the error on opening, without the file's name."""
    with pytest.raises(InputError) as error:
        open_file(path, **options)
    line = str(error.value).splitlines()[0]
    assert line.startswith(f"{path}: ")
    return line.removeprefix(f"{path}: ")


# ----------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("in_memory", ["always", "never"])
def test_round_trip(good, inputs, taxonomy, ids, in_memory):
    data = open_file(good, in_memory=in_memory)
    assert data.inputs.shape == (8, 3)
    assert data.inputs.dtype == torch.float32
    assert torch.equal(data.inputs.rows(np.arange(8)), torch.from_numpy(inputs))
    assert data.labels.dtype == np.int64
    assert np.array_equal(data.labels, taxonomy.encode(LINEAGES))
    assert data.ids.tolist() == ids
    assert data.split.dtype == np.int8
    assert np.array_equal(data.split, SPLIT)
    assert data.taxonomy == taxonomy
    assert data.levels == ("order", "genus")


def test_gaps_in_paths_survive(tmp_path):
    rows = [("A", None, "z"), ("B", None, "z"), ("A", "f", "g")]  # two orphans of one name
    taxonomy = Taxonomy.from_lineages(rows, ("order", "family", "genus"))
    labels = taxonomy.encode(rows)
    path = write_dataset(tmp_path / "a.h5", np.ones((3, 1)), labels, taxonomy, ["1", "2", "3"])
    assert read_contents(path).taxonomy == taxonomy
    assert read_contents(path).taxonomy.path("genus", labels[1, 2]) == ("B", None, "z")


def test_a_file_without_anchors_is_read(good, taxonomy):
    with h5py.File(good, "r+") as file:
        del file["taxonomy/anchors"]
    assert read_contents(good).taxonomy.parents[1].tolist() == taxonomy.parents[1].tolist()


@pytest.mark.parametrize("in_memory", ["always", "never"])
def test_images_stay_uint8(tmp_path, taxonomy, in_memory):
    images = np.random.default_rng(0).integers(0, 256, (8, 4, 5, 3)).astype(np.uint8)
    labels = taxonomy.encode(LINEAGES)
    path = write_dataset(tmp_path / "a.h5", images, labels, taxonomy, list("abcdefgh"), SPLIT)
    data = open_file(path, in_memory=in_memory)
    assert data.inputs.dtype == torch.uint8
    assert data.inputs.shape == (8, 4, 5, 3)
    assert torch.equal(data.inputs.rows(np.array([7, 2])), torch.from_numpy(images[[7, 2]]))


@pytest.mark.parametrize("kind", [np.float64, np.float16, np.int32, np.uint8, bool])
def test_numbers_are_stored_as_float32(tmp_path, taxonomy, kind):
    values = (np.arange(24).reshape(8, 3) % 5).astype(kind)
    labels = taxonomy.encode(LINEAGES)
    path = write_dataset(tmp_path / "a.h5", values, labels, taxonomy, list("abcdefgh"))
    with h5py.File(path) as file:
        assert file["inputs"].dtype == np.float32
        assert np.array_equal(file["inputs"][...], values.astype(np.float32))
        assert np.array_equal(file["split"][...], split_of_ids("abcdefgh"))


@pytest.mark.parametrize("in_memory", ["always", "never"])
@pytest.mark.parametrize("kind", [np.float64, np.float16])
def test_other_floats_are_read_as_float32(good, inputs, kind, in_memory):
    with h5py.File(good, "r+") as file:
        del file["inputs"]
        file["inputs"] = inputs.astype(kind)
    rows = open_file(good, in_memory=in_memory).inputs.rows(np.arange(8))
    assert torch.equal(rows, torch.from_numpy(inputs.astype(kind).astype(np.float32)))


def test_inputs_may_be_a_tensor_or_made_in_blocks(tmp_path, inputs, taxonomy, ids):
    labels = taxonomy.encode(LINEAGES)
    blocks = RowBlocks((8, 3), np.dtype(np.float32), iter([inputs[:5], inputs[5:]]))
    a = write_dataset(tmp_path / "a.h5", torch.from_numpy(inputs), labels, taxonomy, ids)
    b = write_dataset(tmp_path / "b.h5", blocks, labels, taxonomy, ids)
    assert open_file(a).fingerprint == open_file(b).fingerprint
    short = RowBlocks((8, 3), np.dtype(np.float32), iter([inputs[:5]]))
    with pytest.raises(ValueError, match="the blocks have 5 rows"):
        write_dataset(tmp_path / "c.h5", short, labels, taxonomy, ids)
    assert sorted(os.listdir(tmp_path)) == ["a.h5", "b.h5"]


def test_rows_may_be_dropped_while_they_are_made(tmp_path, inputs, taxonomy, ids):
    labels, dropped = taxonomy.encode(LINEAGES), []

    def blocks():
        yield inputs[:3]
        dropped.extend([3, 4])
        yield inputs[5:7]
        dropped.append(7)

    rows = RowBlocks((8, 3), np.dtype(np.float32), blocks(), dropped)
    path = write_dataset(tmp_path / "a.h5", rows, labels, taxonomy, ids, SPLIT)
    data, kept = open_file(path), [0, 1, 2, 5, 6]
    assert np.array_equal(data.inputs.rows(np.arange(5)).numpy(), inputs[kept])
    assert np.array_equal(data.labels, labels[kept])
    assert data.ids.tolist() == [ids[row] for row in kept]
    assert data.split.tolist() == SPLIT[kept].tolist()
    assert data.taxonomy == taxonomy
    nothing = RowBlocks((8, 3), np.dtype(np.float32), iter(()), list(range(8)))
    with pytest.raises(InputError, match="no row is left"):
        write_dataset(tmp_path / "b.h5", nothing, labels, taxonomy, ids)
    assert os.listdir(tmp_path) == ["a.h5"]


def test_rows_are_stored_in_chunks_of_whole_rows(tmp_path):
    taxonomy = Taxonomy.from_parents(["a"], [[-1]])
    n = 300
    path = write_dataset(
        tmp_path / "a.h5", np.zeros((n, 2080)), np.zeros((n, 1), int), taxonomy, list(map(str, range(n)))
    )
    with h5py.File(path) as file:
        assert file["inputs"].chunks == (2**19 // (2080 * 4), 2080)
        assert file["inputs"].compression is None


def test_block_rows():
    assert block_rows((100, 2**10), 4) == 128
    assert block_rows((100, 2**10), 4, chunk_rows=50) == 100  # whole chunks
    assert block_rows((100, 2**20), 4) == 1
    assert block_rows((100, 224, 224, 3), 1) == 3


# -------------------------------------------------------------------------------------- writing


def test_a_file_is_never_overwritten_unasked(good, inputs, taxonomy, ids):
    before = good.read_bytes()
    labels = taxonomy.encode(LINEAGES)
    with pytest.raises(InputError) as error:
        write_dataset(good, inputs + 1, labels, taxonomy, ids)
    assert str(error.value) == f"{good}: exists already\n  allowed: another name, or overwrite"
    assert good.read_bytes() == before
    write_dataset(good, inputs + 1, labels, taxonomy, ids, overwrite=True)
    assert torch.equal(open_file(good).inputs.rows(np.arange(8)), torch.from_numpy(inputs + 1))


def test_a_failed_write_leaves_nothing_and_keeps_what_was_there(good, inputs, taxonomy, ids):
    before = good.read_bytes()

    def blocks():
        yield inputs[:5]
        raise KeyboardInterrupt

    rows = RowBlocks((8, 3), np.dtype(np.float32), blocks())
    with pytest.raises(KeyboardInterrupt):
        write_dataset(good, rows, taxonomy.encode(LINEAGES), taxonomy, ids, overwrite=True)
    assert os.listdir(good.parent) == ["good.h5"]
    assert good.read_bytes() == before


def test_a_file_that_appears_meanwhile_is_kept(tmp_path, inputs, taxonomy, ids):
    path = tmp_path / "a.h5"

    def blocks():
        path.write_text("somebody else's")
        yield inputs

    rows = RowBlocks((8, 3), np.dtype(np.float32), blocks())
    with pytest.raises(InputError, match="exists already"):
        write_dataset(path, rows, taxonomy.encode(LINEAGES), taxonomy, ids)
    assert path.read_text() == "somebody else's"
    assert os.listdir(tmp_path) == ["a.h5"]


def test_the_writer_refuses_what_the_reader_would(tmp_path, inputs, taxonomy, ids):
    path, labels = tmp_path / "a.h5", taxonomy.encode(LINEAGES)

    def problem(*arguments) -> str:
        with pytest.raises(InputError) as error:
            write_dataset(path, *arguments)
        return str(error.value).splitlines()[0].removeprefix(f"{path}: ")

    nan = inputs.copy()
    nan[6, 1] = np.nan
    assert problem(nan, labels, taxonomy, ids) == "inputs: row 6, column 1 is nan"
    huge = inputs.astype(np.float64)
    huge[2, 0] = 1e300
    assert problem(huge, labels, taxonomy, ids) == "inputs: row 2, column 0 is inf"
    assert problem(inputs[:7], labels, taxonomy, ids) == "labels: has 8 rows, but inputs has 7"
    assert problem(inputs, labels, taxonomy, ids[:7]) == "ids: has 7 rows, but inputs has 8"
    assert problem(inputs, labels, taxonomy, ["a", *ids[2:], "a"]) == "ids: row 7 has the id 'a' of row 0"
    assert problem(inputs[:0], labels[:0], taxonomy, []) == "inputs: is float32 of shape (0, 3)"
    assert problem(inputs[:, 0], labels, taxonomy, ids) == "inputs: is float32 of shape (8,)"
    assert (
        problem(np.zeros((8, 2, 2, 3)), labels, taxonomy, ids) == "inputs: is float64 of shape (8, 2, 2, 3)"
    )
    assert problem(inputs.astype(str), labels, taxonomy, ids) == "inputs: is <U32 of shape (8, 3)"
    assert problem(inputs, labels, taxonomy, [*ids[:7], "h\0"]) == r"ids: 'h\x00' holds NUL"
    assert problem(inputs, labels, taxonomy, [*ids[:7], "\ud800"]) == r"ids: '\ud800' is not UTF-8"
    path = tmp_path / "no" / "a.h5"
    assert problem(inputs, labels, taxonomy, ids) == "its folder does not exist"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_is_never_overwritten(tmp_path, inputs, taxonomy, ids, overwrite):
    def blocks():
        raise AssertionError("too late")
        yield inputs

    rows = RowBlocks((8, 3), np.dtype(np.float32), blocks())
    with pytest.raises(InputError) as error:
        write_dataset(tmp_path, rows, taxonomy.encode(LINEAGES), taxonomy, ids, overwrite=overwrite)
    assert str(error.value) == f"{tmp_path}: is a folder\n  allowed: the name of a file"


def test_an_unwritable_folder_is_bad_input(tmp_path, inputs, taxonomy, ids, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data_format, "_write_inputs", full)
    with pytest.raises(InputError, match=r"cannot be written: .*No space left on device"):
        write_dataset(tmp_path / "a.h5", inputs, taxonomy.encode(LINEAGES), taxonomy, ids)
    assert os.listdir(tmp_path) == []


# --------------------------------------------------------------------------------- bad containers


def test_missing_file_names_what_is_near(good):
    path = good.with_name("goood.h5")
    with pytest.raises(InputError) as error:
        open_file(path)
    assert str(error.value) == (
        f"{path}: there is no such file\n  allowed: an HDF5 file; near that name: good.h5"
    )


def test_missing_file_and_folder(tmp_path):
    path = tmp_path / "no" / "a.h5"
    with pytest.raises(InputError) as error:
        open_file(path)
    assert str(error.value) == f"{path}: there is no such file\n  allowed: an HDF5 file"


def test_a_folder(tmp_path):
    assert first_line(tmp_path) == "is a folder"


def test_no_permission(good, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything
    assert first_line(good) == "may not be read"


@pytest.mark.parametrize("content", [b"", b"id,order\n1,A\n", b"\x89HDF"])
def test_not_hdf5(tmp_path, content):
    path = tmp_path / "a.h5"
    path.write_bytes(content)
    assert first_line(path) == "is not an HDF5 file"


@pytest.mark.parametrize("keep", [0.05, 0.5, 0.999])
def test_truncated_hdf5(good, keep):
    content = good.read_bytes()
    good.write_bytes(content[: int(len(content) * keep)])
    assert first_line(good) == "is a truncated or damaged HDF5 file"


def test_damaged_inside(good):
    content = good.read_bytes()
    heap = content.index(b"GCOL")  # where HDF5 keeps strings
    good.write_bytes(content[:heap] + b"XXXX" + content[heap + 4 :])
    assert first_line(good) == "is a truncated or damaged HDF5 file"


# ---------------------------------------------------------------------------------- bad contents


def replace(name: str, value):
    def change(file: h5py.File) -> None:
        del file[name]
        if value is not None:
            file[name] = value

    return change


def poke(name: str, where, value):
    def change(file: h5py.File) -> None:
        file[name][where] = value

    return change


def attribute(name: str, value):
    def change(file: h5py.File) -> None:
        file.attrs[name] = value

    return change


BAD_CONTENTS = {
    "no format": (
        lambda file: file.attrs.clear(),
        "is HDF5, but not a data set of hiertune: its attribute 'format' is missing",
    ),
    "other format": (
        attribute("format", "loom"),
        "is HDF5, but not a data set of hiertune: its attribute 'format' is loom",
    ),
    "other version": (attribute("version", 2), "has format version 2"),
    "no inputs": (replace("inputs", None), "inputs: this dataset is missing"),
    "no labels": (replace("labels", None), "labels: this dataset is missing"),
    "no ids": (replace("ids", None), "ids: this dataset is missing"),
    "no split": (replace("split", None), "split: this dataset is missing"),
    "no taxonomy": (replace("taxonomy", None), "taxonomy/levels: this dataset is missing"),
    "no parents": (replace("taxonomy/parents/1", None), "taxonomy/parents/1: this dataset is missing"),
    "no names": (replace("taxonomy/names/0", None), "taxonomy/names/0: this dataset is missing"),
    "no anchors": (replace("taxonomy/anchors/1", None), "taxonomy/anchors/1: this dataset is missing"),
    "a group": (
        lambda file: (replace("labels", None)(file), file.create_group("labels")),
        "labels: this dataset is missing",
    ),
    "inputs of one dimension": (
        replace("inputs", np.zeros(8, np.float32)),
        "inputs: is float32 of shape (8,)",
    ),
    "integer features": (replace("inputs", np.zeros((8, 3), np.int32)), "inputs: is int32 of shape (8, 3)"),
    "float images": (
        replace("inputs", np.zeros((8, 2, 2, 3), np.float32)),
        "inputs: is float32 of shape (8, 2, 2, 3)",
    ),
    "no features": (replace("inputs", np.zeros((8, 0), np.float32)), "inputs: is float32 of shape (8, 0)"),
    "labels of one dimension": (
        replace("labels", np.zeros(8, int)),
        "labels: labels are int64 of shape (8,)",
    ),
    "labels of three levels": (
        replace("labels", np.zeros((8, 3), int)),
        "labels: labels are int64 of shape (8, 3)",
    ),
    "float labels": (replace("labels", np.zeros((8, 2))), "labels: labels are float64 of shape (8, 2)"),
    "fewer labels": (replace("labels", np.zeros((7, 2), int)), "labels: has 7 rows, but inputs has 8"),
    "more ids": (replace("ids", [str(i) for i in range(9)]), "ids: has 9 rows, but inputs has 8"),
    "shorter split": (replace("split", SPLIT[:5]), "split: has 5 rows, but inputs has 8"),
    "scalar split": (replace("split", 0), "split: has no rows, but inputs has 8"),
    "label too high": (poke("labels", (5, 1), 4), "labels: genus: row 5 has label 4"),
    "label too low": (poke("labels", (2, 0), -2), "labels: order: row 2 has label -2"),
    "label contradicts": (
        poke("labels", (1, 0), 1),
        "labels: row 1 is labelled 'B' at level 'order', but its class at level 'genus' is 'A; y'",
    ),
    "duplicate ids": (poke("ids", 6, "row 2 ä"), "ids: row 6 has the id 'row 2 ä' of row 2"),
    "ids are numbers": (replace("ids", np.arange(8)), "ids: is int64 of shape (8,)"),
    "split value": (poke("split", 3, 7), "split: row 3 is 7"),
    "negative split": (poke("split", 7, -1), "split: row 7 is -1"),
    "float split": (replace("split", SPLIT.astype(float)), "split: is float64 of shape (8,)"),
    "parent out of range": (
        poke("taxonomy/parents/1", 2, 5),
        "taxonomy: class 'y' (2) of level 'genus' has parent 5",
    ),
    "level name": (
        replace("taxonomy/levels", ["order", "a/b"]),
        "taxonomy: 'a/b' cannot be the name of a level",
    ),
    "duplicate levels": (
        replace("taxonomy/levels", ["order", "order"]),
        "taxonomy: level 'order' is named twice",
    ),
    "levels are numbers": (replace("taxonomy/levels", [1, 2]), "taxonomy/levels: is int64 of shape (2,)"),
    "NaN": (poke("inputs", (4, 2), np.nan), "inputs: row 4, column 2 is nan"),
    "infinite": (poke("inputs", (7, 0), -np.inf), "inputs: row 7, column 0 is -inf"),
    "beyond float32": (replace("inputs", np.full((8, 3), 1e39)), "inputs: row 0, column 0 is inf"),
}


@pytest.mark.parametrize("in_memory", ["always", "never"])
@pytest.mark.parametrize("case", BAD_CONTENTS)
def test_bad_contents(good, case, in_memory):
    change, expected = BAD_CONTENTS[case]
    with h5py.File(good, "r+") as file:
        change(file)
    assert first_line(good, in_memory=in_memory) == expected


def test_what_is_allowed_is_said(good):
    with h5py.File(good, "r+") as file:
        file["split"][3] = 7
    with pytest.raises(InputError) as error:
        open_file(good)
    assert str(error.value).splitlines()[1] == "  allowed: 0 (train), 1 (val), 2 (test)"
    with h5py.File(good, "r+") as file:
        file["labels"][5, 1] = 9
    with pytest.raises(InputError) as error:
        open_file(good)
    assert str(error.value).splitlines()[1] == "  allowed: -1 (unknown) to 3"


def test_ids_that_are_not_utf8(good):
    with h5py.File(good, "r+") as file:
        del file["ids"]
        file.create_dataset(
            "ids", data=[b"\xff", *(bytes([65 + i]) for i in range(7))], dtype=h5py.string_dtype()
        )
    assert first_line(good) == "ids: has text that is not UTF-8"


def test_nan_beyond_the_first_block(tmp_path, monkeypatch):
    monkeypatch.setattr(data_format, "BLOCK_BYTES", 64)
    taxonomy = Taxonomy.from_parents(["a"], [[-1]])
    path = write_dataset(
        tmp_path / "a.h5", np.zeros((50, 2)), np.zeros((50, 1), int), taxonomy, list(map(str, range(50)))
    )
    with h5py.File(path, "r+") as file:
        assert file["inputs"].chunks == (8, 2)
        file["inputs"][37, 1] = np.nan
        file["inputs"][49, 0] = np.inf
    for in_memory in ("always", "never"):
        assert first_line(path, in_memory=in_memory) == "inputs: row 37, column 1 is nan"
