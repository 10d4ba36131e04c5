from __future__ import annotations

import hashlib
import io
import os

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from hiertune.data import ImageOptions, import_images, split_of_ids

SMALL = ImageOptions(size=8)

TABLE = """folder,order,family,species
cat,Carnivora,Felidae,F. catus
dog,Carnivora,Canidae,C. familiaris
fly,Diptera,,M. domestica
owl,Strigiformes,incertae sedis,misc
"""


@pytest.fixture
def classes(tmp_path, image):
    """Folders of classes with two images each, and the pixels of each."""
    names = [f"{name}/{i}.png" for name in ("cat", "dog", "fly", "owl") for i in range(2)]
    return {name: image(tmp_path / "images" / name, seed) for seed, name in enumerate(names)}


def write_table(path, text=TABLE):
    if path.suffix == ".parquet":
        pd.read_csv(io.StringIO(text)).to_parquet(path)
    else:
        path.write_text(text.replace(",", "\t") if path.suffix == ".tsv" else text)
    return path


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.parquet"])
def test_folders_of_classes_with_a_table(tmp_path, classes, open_images, paths_of, name):
    out = tmp_path / "out.h5"
    table = write_table(tmp_path / name)
    assert import_images(tmp_path / "images", out, table, options=SMALL, unknown=["MISC"]) == out
    data, pixels = open_images(out)
    assert data.levels == ("order", "family", "species")
    assert data.ids.tolist() == ["cat/0", "cat/1", "dog/0", "dog/1", "fly/0", "fly/1", "owl/0", "owl/1"]
    assert np.array_equal(pixels, np.stack(list(classes.values())))
    assert paths_of(data)[::2] == [
        ("Carnivora", "Felidae", "F. catus"),
        ("Carnivora", "Canidae", "C. familiaris"),
        ("Diptera", None, "M. domestica"),
        ("Strigiformes", None, None),
    ]
    assert np.array_equal(data.split, split_of_ids(data.ids))


def test_columns_can_be_chosen(tmp_path, classes, open_images, paths_of):
    table = write_table(
        tmp_path / "t.csv", "order,genus,name,n\nC,F,cat,1\nC,D,dog,2\nD,,fly,3\nS,O,owl,4\nX,X,not here,5\n"
    )
    out = tmp_path / "out.h5"
    import_images(tmp_path / "images", out, table, ["order", "name"], class_column="name", options=SMALL)
    data, _ = open_images(out)
    assert data.levels == ("order", "name")
    assert paths_of(data)[::2] == [("C", "cat"), ("C", "dog"), ("D", "fly"), ("S", "owl")]
    assert data.taxonomy.num_classes == (3, 4), "a class without a folder is none"


def test_folders_of_splits(tmp_path, image, open_images, paths_of):
    folder = tmp_path / "images"
    files = ["Train/cat/1.png", "Train/dog/deeper/2.png", "VALID/cat/1.png", "test/dog/4.png"]
    for seed, name in enumerate(files):
        image(folder / name, seed)
    table = write_table(tmp_path / "t.csv")
    import_images(folder, tmp_path / "out.h5", table, ["family"], options=SMALL)
    data, _ = open_images(tmp_path / "out.h5")
    assert data.ids.tolist() == ["Train/cat/1", "Train/dog/deeper/2", "VALID/cat/1", "test/dog/4"]
    assert data.split.tolist() == [0, 0, 1, 2]
    assert paths_of(data) == [("Felidae",), ("Canidae",), ("Felidae",), ("Canidae",)]


@pytest.mark.parametrize(
    ("files", "splits", "others"),
    [
        (["train/a/1.png", "val/a/1.png", "extra/a/1.png"], "'train', 'val'", "'extra'"),
        (["Test/1.png", "car/1.png", "bus/1.png"], "'Test'", "'bus', 'car'"),
        (["validation/a/1.png", "1.png"], "'validation'", "'.'"),
    ],
)
def test_splits_beside_other_folders_are_not_guessed(tmp_path, image, message, files, splits, others):
    folder = tmp_path / "images"
    for name in files:
        image(folder / name)
    (folder / "empty").mkdir()
    found = message(import_images, folder, tmp_path / "out.h5", levels=["a", "b"], options=SMALL)
    assert found.splitlines() == [
        f"{folder}: has images in {splits}, which name splits, and in {others}, which do not",
        "  allowed: either splits alone (train, val, valid, validation, test) or none",
    ]


def test_links_are_followed_once(tmp_path, image, open_images):
    folder = tmp_path / "images"
    image(folder / "cat/1.png", 1)
    image(tmp_path / "elsewhere/2.png", 2)
    (folder / "cat/again").symlink_to(folder)  # a loop
    (folder / "alias").symlink_to(folder / "cat")  # read before cat, were links as good as folders
    (folder / "dog").symlink_to(tmp_path / "elsewhere")
    console = Console(file=io.StringIO(), width=300)
    options = {"levels": ["kind"], "options": SMALL, "console": console}
    import_images(folder, tmp_path / "out.h5", **options)
    assert open_images(tmp_path / "out.h5")[0].ids.tolist() == ["cat/1", "dog/2"]
    said = "note: links to folders that are read anyway are left out: alias, cat/again\n"
    assert said in console.file.getvalue()


def test_images_unknown_at_all_levels_are_left_out(tmp_path, classes, open_images):
    table = write_table(tmp_path / "t.csv", TABLE.replace("Diptera,,M. domestica", ",unknown,NA"))
    console = Console(file=io.StringIO(), width=300)
    (tmp_path / "images/fly/0.png").write_text("broken, but not read")
    import_images(tmp_path / "images", tmp_path / "out.h5", table, options=SMALL, console=console)
    data, pixels = open_images(tmp_path / "out.h5")
    assert data.ids.tolist() == ["cat/0", "cat/1", "dog/0", "dog/1", "owl/0", "owl/1"]
    kept = [pixels for name, pixels in classes.items() if not name.startswith("fly")]
    assert np.array_equal(pixels, np.stack(kept))
    assert "note: 2 of 8 rows are unknown at all levels, and left out\n" in console.file.getvalue()


def test_names_that_are_not_utf8(tmp_path, image, message):
    """Before an image is read: these are none."""
    folder, out = tmp_path / "images", tmp_path / "out.h5"
    (folder / "cat").mkdir(parents=True)
    bad = os.fsdecode(b"caf\xe9")
    (folder / "cat" / f"{bad}.jpg").write_text("no image")
    found = message(import_images, folder, out, levels=["kind"], options=SMALL)
    assert found == r"file name: 'cat/caf\udce9.jpg' is not UTF-8" + "\n  allowed: text in UTF-8, without NUL"
    (folder / "cat" / f"{bad}.jpg").rename(folder / "cat" / "1.jpg")
    (folder / "cat").rename(folder / bad)
    found = message(import_images, folder, out, levels=["kind"], options=SMALL)
    assert found.splitlines()[0] == r"class 0 of level 'kind' is named 'caf\udce9'"


def test_one_split_alone_is_none(tmp_path, image, open_images):
    for i in range(20):
        image(tmp_path / "images" / "train" / "cat" / f"{i}.png", i)
    out = tmp_path / "out.h5"
    import_images(tmp_path / "images", out, levels=["kind"], options=SMALL)
    data, _ = open_images(out)
    assert np.array_equal(data.split, split_of_ids(data.ids))
    assert data.taxonomy.names == (("cat",),)


def test_nested_folders_are_the_taxonomy(tmp_path, image, open_images, paths_of):
    folder = tmp_path / "images"
    files = [
        "A/x/p/1.png",
        "A/x/unknown/2.png",
        "A/y/3.jpg",
        "A/y/3.png",
        "B/x/p/1.png",
        "B/incertae_sedis/q/1.png",
        "C/1.png",
    ]
    for seed, name in enumerate(files):
        image(folder / name, seed)
    for name in (".hidden/x/p/1.png", "A/x/p/.1.png", "A/notes.txt", "A/x/Thumbs.db", "A/read.txt"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text("no image")
    console = Console(file=io.StringIO(), width=200)
    import_images(
        folder, tmp_path / "out.h5", levels=["order", "family", "genus"], options=SMALL, console=console
    )
    assert "3 other files are left out: 2 .txt, 1 .db" in console.file.getvalue()
    data, _ = open_images(tmp_path / "out.h5")
    assert dict(zip(data.ids.tolist(), paths_of(data), strict=True)) == {
        "A/x/p/1": ("A", "x", "p"),
        "A/x/unknown/2": ("A", "x", None),
        "A/y/3.jpg": ("A", "y", None),
        "A/y/3.png": ("A", "y", None),
        "B/incertae_sedis/q/1": ("B", None, "q"),
        "B/x/p/1": ("B", "x", "p"),
        "C/1": ("C", None, None),
    }
    assert data.taxonomy.num_classes == (3, 3, 3), "x of A and x of B are two"


def test_the_shares_make_missing_splits(tmp_path, classes, open_images):
    out = tmp_path / "out.h5"
    options = ImageOptions(size=8, val_share=0.3, test_share=0.3)
    import_images(tmp_path / "images", out, levels=["kind"], options=options)
    data, _ = open_images(out)
    expected = [2 if s < 0.3 else 1 if s < 0.6 else 0 for s in map(share, data.ids)]
    assert data.split.tolist() == expected


def share(name):
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32


def test_skipping_broken_images(tmp_path, classes, open_images, message):
    (tmp_path / "images/dog/0.png").write_bytes(b"broken")
    table, out = write_table(tmp_path / "t.csv"), tmp_path / "out.h5"
    found = message(import_images, tmp_path / "images", out, table, options=SMALL)
    assert found.startswith(f"{tmp_path}/images/dog/0.png: cannot be read as an image")
    assert not out.exists()
    import_images(tmp_path / "images", out, table, options=ImageOptions(size=8, skip_broken=True))
    data, pixels = open_images(out)
    assert data.ids.tolist() == ["cat/0", "cat/1", "dog/1", "fly/0", "fly/1", "owl/0", "owl/1"]
    kept = [image for name, image in classes.items() if name != "dog/0.png"]
    assert np.array_equal(pixels, np.stack(kept))


@pytest.mark.parametrize(
    ("text", "options", "file", "expected"),
    [
        (TABLE.replace("owl", "bat"), {}, "t.csv",
         ": folder: has no row for 1 of the folders in {tmp}/images: 'owl'"),
        ("folder,kind\nx,y\n", {}, "t.csv",
         ": folder: has no row for 4 of the folders in {tmp}/images: 'cat', 'dog', 'fly', 'owl'"),
        (TABLE, {"levels": ["ordr"]}, "t.csv", ": has no column 'ordr'"),
        (TABLE, {"class_column": "kind"}, "t.csv", ": has no column 'kind'"),
        (TABLE + "cat,Carnivora,Felidae,F. catus\n\ncat,Diptera,,x\n", {}, "t.csv",
         ":8: column 'folder' is 'cat' again, with another lineage"),
        ("folder,order\n", {}, "t.csv", ": has no rows"),
        ("folder\ncat\ndog\nfly\nowl\n", {}, "t.csv", ": has no column besides 'folder'"),
    ],
)  # fmt: skip
def test_bad_tables(tmp_path, classes, message, text, options, file, expected):
    table = write_table(tmp_path / "t.csv", text)
    found = message(import_images, tmp_path / "images", tmp_path / "o.h5", table, options=SMALL, **options)
    assert found.splitlines()[0] == f"{tmp_path / file}{expected.format(tmp=tmp_path)}"


def test_bad_folders(tmp_path, image, message):
    folder, out = tmp_path / "images", tmp_path / "out.h5"
    assert message(import_images, folder, out) == f"{folder}: there is no such folder"
    folder.mkdir()
    (folder / "a.txt").write_text("text")
    assert message(import_images, folder, out).startswith(f"{folder}: has no images\n  allowed: .jpg, ")
    image(folder / "A/x/1.png")
    found = message(import_images, folder, out)
    assert found.startswith(f"{folder}: without a table, the levels need names\n")
    assert "--levels with 2 names" in found
    found = message(import_images, folder, out, levels=["order"])
    assert found.splitlines()[0] == f"{folder}/A/x/1.png: lies in 2 folders that could name its class"
    image(folder / "2.png")
    found = message(import_images, folder, out, levels=["order", "genus"])
    assert found.splitlines()[0] == f"{folder}/2.png: lies in no folder that could name its class"
    table = write_table(tmp_path / "t.csv")
    found = message(import_images, folder, out, table)
    assert found.splitlines()[0] == f"{folder}/2.png: lies in no folder of a class"
