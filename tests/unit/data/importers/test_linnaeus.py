from __future__ import annotations

import io
from itertools import pairwise

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from hiertune.data import ImageOptions, import_linnaeus, split_of_ids
from hiertune.data.importers.linnaeus import _report_conflicts, _with_known_ancestors

SMALL = ImageOptions(size=8)

# order, family, genus, species; 0 = unknown
TAXA = [
    (40, 30, 20, 10),
    (40, 30, 20, 11),
    (40, 30, 0, 0),
    (40, 0, 21, 12),
    (0, 0, 20, 10),  # what it leaves out, row 0 says
    (41, 31, 22, 13),
    (0, 0, 0, 14),  # an orphan
    (0, 0, 0, 0),
]
IDENTIFIERS = [f"{i}_0.png" for i in range(len(TAXA))]
NAMES = ["order", "family", "genus", "species"]


@pytest.fixture
def labels(tmp_path):
    """Write labels.h5 of these rows, coarse -> fine, and return its path."""

    def write(taxa=TAXA, identifiers=IDENTIFIERS, ranks=("40", "30", "20", "10"), **more):
        path = tmp_path / "labels.h5"
        with h5py.File(path, "w") as file:
            file.create_dataset("img_identifiers", data=identifiers, dtype=h5py.string_dtype())
            for rank, column in zip(ranks, np.array(taxa, np.uint32).T, strict=True):
                file[f"taxa_L{rank}"] = column
            file.create_group("metadata").attrs["config_json"] = "{}"
            for name, values in more.items():
                file[name] = values
        return path

    return write


@pytest.fixture
def folder(tmp_path, image):
    """The folder of the images, and their pixels."""
    return tmp_path / "images", np.stack(
        [image(tmp_path / "images" / name, seed) for seed, name in enumerate(IDENTIFIERS)]
    )


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=400)


def told(console) -> list[str]:
    return console.file.getvalue().splitlines()


def test_images_in_a_folder(tmp_path, labels, folder, console, open_images, paths_of):
    images, pixels = folder
    out = tmp_path / "out.h5"
    path = labels(spatial=np.zeros((8, 3)), elevation_micro=np.zeros((8, 2)))
    assert import_linnaeus(path, out, images, options=SMALL, console=console) == out
    data, found = open_images(out)
    assert data.levels == ("taxa_L40", "taxa_L30", "taxa_L20", "taxa_L10")
    assert paths_of(data) == [
        ("40", "30", "20", "10"),
        ("40", "30", "20", "11"),
        ("40", "30", None, None),
        ("40", None, "21", "12"),
        (None, None, "20", "10"),
        ("41", "31", "22", "13"),
        (None, None, None, "14"),
    ], "labels stay as they are; the row without any is left out"
    assert data.taxonomy.num_classes == (2, 2, 3, 5), "rows 0 and 4 name the same classes"
    assert data.labels[0, 3] == data.labels[4, 3]
    assert (data.labels[0] >= 0).all(), "class 0 is a class, not unknown"
    assert data.ids.tolist() == [f"{i}_0" for i in range(7)]
    assert np.array_equal(data.split, split_of_ids(data.ids))
    assert np.array_equal(found, pixels[:7])
    assert told(console) == [
        "note: only labels and images are taken over, not elevation_micro, spatial",
        "note: 1 of 8 rows are unknown at all levels, and left out",
    ]


def test_an_extension_is_added(tmp_path, labels, folder, open_images, message):
    images, pixels = folder
    path = labels(identifiers=[name.removesuffix(".png") for name in IDENTIFIERS])
    found = message(import_linnaeus, path, tmp_path / "out.h5", images, options=SMALL)
    assert found.splitlines()[0] == f"{images}/0_0: there is no such image; 7 of 7 are missing"
    import_linnaeus(path, tmp_path / "out.h5", images, extension=".png", options=SMALL)
    data, rows = open_images(tmp_path / "out.h5")
    assert np.array_equal(rows, pixels[:7])
    assert data.ids.tolist() == [f"{i}_0" for i in range(7)]


def test_names_and_levels(tmp_path, labels, folder, open_images, paths_of):
    path, images = labels(), folder[0]
    import_linnaeus(path, tmp_path / "a.h5", images, names=NAMES, options=SMALL)
    assert open_images(tmp_path / "a.h5")[0].levels == tuple(NAMES)
    levels = ["taxa_L30", "taxa_L10"]
    import_linnaeus(path, tmp_path / "b.h5", images, levels=levels, names=["F", "S"], options=SMALL)
    data, _ = open_images(tmp_path / "b.h5")
    assert data.levels == ("F", "S")
    assert paths_of(data)[:2] == [("30", "10"), ("30", "11")]


def test_taxa_get_names(tmp_path, labels, folder, open_images, paths_of, message):
    path, images = labels(), folder[0]
    rows = "40,O\n41,P\n30,F\n31,G\n20,Aus\n21,Bus\n22,Aus\n10,a\n11,b\n12,c\n13,d\n14,e\n"
    (tmp_path / "taxa.csv").write_text(f"id,name\n{rows}")
    import_linnaeus(path, tmp_path / "a.h5", images, taxa=tmp_path / "taxa.csv", options=SMALL)
    found = paths_of(open_images(tmp_path / "a.h5")[0])
    assert found[0] == ("O", "F", "Aus (20)", "a"), "two genera of one name stay two"
    assert found[3] == ("O", None, "Bus", "c")
    assert found[5] == ("P", "G", "Aus (22)", "d")
    (tmp_path / "taxa.csv").write_text(f"id,name\n{rows.replace('12,c', '12,')}".replace("13,d\n", ""))
    found = message(import_linnaeus, path, tmp_path / "b.h5", images, taxa=tmp_path / "taxa.csv")
    assert found.splitlines()[0] == f"{tmp_path}/taxa.csv: name: has no name for 2 of the taxa: 12, 13"
    (tmp_path / "taxa.csv").write_text(f"id,name\n{rows}10,a\n10,b\n")
    found = message(import_linnaeus, path, tmp_path / "b.h5", images, taxa=tmp_path / "taxa.csv")
    assert found.splitlines()[0] == f"{tmp_path}/taxa.csv:15: column 'id' is '10' again, with another name"
    (tmp_path / "taxa.csv").write_text("taxon_id,name\n1,a\n")
    found = message(import_linnaeus, path, tmp_path / "b.h5", images, taxa=tmp_path / "taxa.csv")
    assert found.splitlines()[0] == f"{tmp_path}/taxa.csv: has no column 'id'"


def test_ranks_are_ordered_as_numbers_and_empty_ones_are_no_levels(
    tmp_path, labels, folder, console, open_images, message
):
    taxa = [(70, 0, 33, 5)] * 8
    path, images = labels(taxa, ranks=("70", "40", "33_5", "5")), folder[0]
    import_linnaeus(
        path, tmp_path / "a.h5", images, names=["k", "o", "e", "s"], options=SMALL, console=console
    )
    assert open_images(tmp_path / "a.h5")[0].levels == ("k", "e", "s")
    assert told(console) == ["note: no row has a label at taxa_L40: no levels are made of them"]
    found = message(import_linnaeus, path, tmp_path / "b.h5", images, levels=["taxa_L40", "taxa_L5"])
    assert "level 'taxa_L40' is empty" in found


def test_parents_are_found_across_rows(tmp_path, labels, folder, console, open_images):
    """Each row leaves out something that the others together say."""
    taxa = [(0, 0, 20, 10), (0, 30, 20, 0), (40, 30, 0, 0), (0, 0, 0, 10), (0, 30, 0, 11), (40, 0, 0, 11)]
    path = labels(taxa + [(0, 0, 0, 10)] * 2)
    import_linnaeus(path, tmp_path / "a.h5", folder[0], options=SMALL, console=console)
    data, _ = open_images(tmp_path / "a.h5")
    assert data.taxonomy.num_classes == (1, 1, 1, 2)
    path_of = {name: data.taxonomy.path("taxa_L10", i) for i, name in enumerate(data.taxonomy.names[3])}
    assert path_of == {"10": ("40", "30", "20", "10"), "11": ("40", "30", None, "11")}
    assert told(console) == []


@st.composite
def trees_with_gaps(draw):
    """Lineages [U, 4] of one tree whose taxa each have an id of their own, some of them left out."""
    sizes = [draw(st.integers(1, 4)) for _ in range(4)]
    parents = [
        draw(st.lists(st.integers(0, above - 1), min_size=n, max_size=n)) for above, n in pairwise(sizes)
    ]
    rows = []
    for leaf in draw(st.lists(st.integers(0, sizes[3] - 1), min_size=1, max_size=8)):
        row = [leaf]
        for above in reversed(parents):
            row.insert(0, above[row[0]])
        known = draw(st.lists(st.booleans(), min_size=4, max_size=4))
        rows.append(
            [10 * level + i + 1 if k else 0 for level, (i, k) in enumerate(zip(row, known, strict=True))]
        )
    return np.array(rows)


@settings(max_examples=200, deadline=None)
@given(trees_with_gaps())
def test_a_taxon_of_a_tree_is_one_class_whatever_is_left_out(rows):
    filled = _with_known_ancestors(rows)
    console = Console(file=io.StringIO(), width=400)
    _report_conflicts(filled, np.ones(len(rows), int), NAMES, console)
    assert told(console) == []
    assert ((filled == rows) | (rows == 0)).all()
    for level in range(1, 4):
        of_taxon = {}
        for row in filled[filled[:, level] > 0].tolist():
            assert of_taxon.setdefault(row[level], row[:level]) == row[:level]


def test_a_taxon_under_two_parents_is_told(tmp_path, labels, folder, console, open_images, paths_of):
    taxa = [
        (40, 30, 20, 10),
        (40, 30, 20, 10),
        (41, 31, 20, 10),
        (0, 0, 20, 10),
        (40, 30, 21, 11),
        (40, 30, 0, 12),
        (0, 0, 0, 12),
        (0, 0, 22, 12),
    ]
    import_linnaeus(labels(taxa), tmp_path / "a.h5", folder[0], options=SMALL, console=console)
    assert told(console) == [
        "note: 1 taxon is seen under several parents, and made a class under each of them: taxa_L20 20 under "
        "nothing known (1 row) and taxa_L30 30 (2 rows) and taxa_L30 31 (1 row)"
    ]
    data, _ = open_images(tmp_path / "a.h5")
    assert paths_of(data)[:4] == [
        ("40", "30", "20", "10"),
        ("40", "30", "20", "10"),
        ("41", "31", "20", "10"),
        (None, None, "20", "10"),
    ]
    genera = data.labels[:4, 2].tolist()
    assert genera[0] == genera[1]
    assert len(set(genera)) == 3
    assert sorted(data.taxonomy.names[2]) == ["20", "20", "20", "21", "22"]


# -------------------------------------------------------------------------------------- images.h5


def write_images(path, pixels, identifiers=None, **options):
    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=pixels, **options)
        if identifiers is not None:
            file.create_dataset("img_identifiers", data=identifiers, dtype=h5py.string_dtype())
    return path


@pytest.mark.parametrize("options", [{}, {"chunks": (3, 8, 8, 3), "compression": "gzip"}])
def test_images_in_the_order_of_the_labels(tmp_path, labels, folder, open_images, options):
    taxa = [(0, 0, 0, 0), *TAXA[:7]]  # the row that is left out comes first: rows must not shift
    images = write_images(tmp_path / "images.h5", folder[1], **options)
    import_linnaeus(labels(taxa), tmp_path / "out.h5", images, options=ImageOptions(size=8, threads=3))
    data, found = open_images(tmp_path / "out.h5")
    assert data.ids.tolist() == [f"{i}_0" for i in range(1, 8)]
    assert np.array_equal(found, folder[1][1:])


def test_images_with_identifiers_of_their_own(tmp_path, labels, folder, open_images, message):
    order = [5, 1, 7, 0, 3, 2, 6]  # not 4
    images = write_images(tmp_path / "images.h5", folder[1][order], [IDENTIFIERS[i] for i in order])
    found = message(import_linnaeus, labels(), tmp_path / "out.h5", images, options=SMALL)
    assert found.splitlines()[0] == (
        f"{images}: img_identifiers: has no image for 1 of 7 rows, such as '4_0.png'"
    )
    options = ImageOptions(size=8, skip_broken=True)
    import_linnaeus(labels(), tmp_path / "out.h5", images, options=options)
    data, found = open_images(tmp_path / "out.h5")
    assert data.ids.tolist() == [f"{i}_0" for i in (0, 1, 2, 3, 5, 6)]
    assert np.array_equal(found, folder[1][[0, 1, 2, 3, 5, 6]])


def test_images_of_another_size_are_resized(tmp_path, labels, open_images):
    images = write_images(tmp_path / "images.h5", np.full((8, 30, 20, 3), 77, np.uint8))
    import_linnaeus(labels(), tmp_path / "out.h5", images, options=SMALL)
    _, found = open_images(tmp_path / "out.h5")
    assert found.shape == (7, 8, 8, 3)
    assert (found == 77).all()


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"names": ["genus", "species"]}, "labels.h5: 2 names are given"),
        ({"names": NAMES[::-1]}, "labels.h5: taxa_L40 is named 'species'"),
        ({"levels": ["taxa_L10", "taxa_L20"]},
         "labels.h5: the levels taxa_L10, taxa_L20 are not coarse to fine"),
        ({"levels": ["taxa_L50"]}, "labels.h5: has no dataset 'taxa_L50'"),
        ({"levels": ["taxa_L20", "taxa_L20"]},
         "labels.h5: the levels taxa_L20, taxa_L20 are not coarse to fine"),
    ],
)  # fmt: skip
def test_bad_options(tmp_path, labels, message, options, expected):
    found = message(import_linnaeus, labels(), tmp_path / "out.h5", tmp_path, **options)
    assert found.splitlines()[0] == f"{tmp_path}/{expected}"


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("img_identifiers", None, "img_identifiers: this dataset is missing or of another kind"),
        ("img_identifiers", ["a", "a"], "img_identifiers: 'a' occurs twice"),
        ("img_identifiers", np.array([b"a", b"caf\xe9"]), r"img_identifiers: row 1 is b'caf\xe9'"),
        ("taxa_L10", np.ones(8), "taxa_L10: is float64 of shape (8,)"),
        ("taxa_L10", np.ones(7, np.uint32), "taxa_L10: is uint32 of shape (7,)"),
        ("taxa_L10", np.arange(8) - 3, "taxa_L10: row 0 is -3"),
    ],
)
def test_bad_labels(tmp_path, labels, message, name, values, expected):
    path = labels()
    with h5py.File(path, "r+") as file:
        del file[name]
        if values is not None:
            file[name] = values
    found = message(import_linnaeus, path, tmp_path / "out.h5", tmp_path)
    assert found.splitlines()[0] == f"{path}: {expected}"


@pytest.mark.parametrize("name", ["../a", "/etc/a", "b/../../a", "."])
def test_identifiers_that_lead_out_of_the_folder(tmp_path, labels, folder, message, name):
    path = labels(identifiers=[*IDENTIFIERS[:3], name, *IDENTIFIERS[4:]])
    found = message(import_linnaeus, path, tmp_path / "out.h5", folder[0], options=SMALL)
    assert found.splitlines() == [
        f"{path}: img_identifiers: row 3 is {name!r}",
        "  allowed: a path below --images",
    ]


@pytest.mark.parametrize("identifiers", [None, IDENTIFIERS[:3]])
@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (8, 0, 8, 3), (8, 8, 0, 3)])
def test_images_of_no_size(tmp_path, labels, message, shape, identifiers):
    images = write_images(tmp_path / "images.h5", np.zeros(shape, np.uint8), identifiers)
    found = message(import_linnaeus, labels(), tmp_path / "out.h5", images, options=SMALL)
    assert found.splitlines() == [
        f"{images}: images: is uint8 of shape {shape}",
        "  allowed: uint8 [images, height, width, 3], none zero",
    ]


def test_an_identifier_for_each_image(tmp_path, labels, folder, message):
    images = write_images(tmp_path / "images.h5", folder[1][:5], IDENTIFIERS)
    found = message(import_linnaeus, labels(), tmp_path / "out.h5", images, options=SMALL)
    assert found.splitlines()[0] == f"{images}: images: has 5 rows, but its img_identifiers 8"
    assert not (tmp_path / "out.h5").exists()


def test_other_bad_files(tmp_path, labels, folder, message):
    out, path, images = tmp_path / "out.h5", labels(), tmp_path / "images.h5"
    assert "there is no such file" in message(import_linnaeus, path, out, images)
    write_images(images, folder[1][:5])
    found = message(import_linnaeus, path, out, images)
    assert found.splitlines()[0] == f"{images}: images: has 5 rows, but {path} has 8"
    write_images(images, folder[1].astype(np.float32))
    found = message(import_linnaeus, path, out, images)
    assert found.splitlines()[0] == f"{images}: images: is float32 of shape (8, 8, 8, 3)"
    assert "extension: is '.jpg'" in message(import_linnaeus, path, out, images, extension=".jpg")
    with h5py.File(path, "r+") as file:
        for rank in (10, 20, 30, 40):
            del file[f"taxa_L{rank}"]
    assert "has no labels" in message(import_linnaeus, path, out, images)
    assert "is empty" in message(import_linnaeus, labels([(0, 0, 0, 0)] * 8), out, images)
    assert not out.exists()
