"""Files in the layout of each year, as https://github.com/visipedia/inat_comp documents them."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from hiertune.data import ImageOptions, import_inat, split_of_ids

SMALL = ImageOptions(size=8)

CATEGORIES_2017 = [
    {"id": 0, "name": "Apis mellifera", "supercategory": "Insecta"},
    {"id": 7, "name": "Corvus corax", "supercategory": "Aves"},
    {"id": 3, "name": "Corvus", "supercategory": "Aves"},
]
RANKED = ("supercategory", "kingdom", "phylum", "class", "order", "family", "genus", "name")
RANKS_2018 = [
    ("Insects", "Animalia", "Arthropoda", "Insecta", "Hymenoptera", "Apidae", "Apis", "Apis mellifera"),
    ("Birds", "Animalia", "Chordata", "Aves", "Passeriformes", "Corvidae", "Corvus", "Corvus corax"),
    ("Birds", "Animalia", "Chordata", "Aves", "Passeriformes", "Corvidae", "Corvus", "Corvus corone"),
]
CATEGORIES_2018 = [
    {"id": number, **dict(zip(RANKED, row, strict=True))}
    for number, row in zip((0, 7, 3), RANKS_2018, strict=True)
]
OBFUSCATED_2018 = [
    {key: value if key == "id" else f"obfuscated {value}" for key, value in category.items()}
    for category in CATEGORIES_2018
]
CATEGORIES_2021 = [
    category
    | {
        "common_name": f"common {category['name']}",
        "specific_epithet": category["name"].split()[1],
        "image_dir_name": f"{category['id']:05d}_{category['kingdom']}",
    }
    for category in CATEGORIES_2018
]
LEVELS = ("kingdom", "phylum", "class", "order", "family", "genus", "species")


@pytest.fixture
def year(tmp_path, image):
    """Write a file of annotations and its images; returns its path and the pixels of each image."""

    def write(name, categories, images):
        number = sum(map(ord, name))  # ids differ between the files
        records = [
            {"id": number + i, "file_name": file, "width": 8, "height": 8, "license": 1, "rights_holder": "x"}
            for i, (file, _) in enumerate(images)
        ]
        annotations = [
            {"id": i, "image_id": number + i, "category_id": category}
            for i, (_, category) in reversed(list(enumerate(images)))
        ]
        content = {
            "info": {"year": 2018},
            "images": records,
            "annotations": annotations,
            "categories": categories,
            "licenses": [],
        }
        (tmp_path / name).write_text(json.dumps(content))
        pixels = [image(tmp_path / "images" / file, seed) for seed, (file, _) in enumerate(images)]
        return tmp_path / name, pixels

    return write


def test_2017(tmp_path, year, open_images, paths_of):
    train, pixels = year(
        "train2017.json",
        CATEGORIES_2017,
        [("train_val_images/Insecta/Apis mellifera/a.png", 0), ("train_val_images/Aves/Corvus/b.png", 3)],
    )
    out = tmp_path / "out.h5"
    assert import_inat([train], out, tmp_path / "images", options=SMALL) == out
    data, found = open_images(out)
    assert data.levels == ("supercategory", "name")
    assert paths_of(data) == [("Insecta", "Apis mellifera"), ("Aves", "Corvus")]
    assert data.ids.tolist() == [
        "train_val_images/Insecta/Apis mellifera/a",
        "train_val_images/Aves/Corvus/b",
    ]
    assert np.array_equal(found, np.stack(pixels))
    assert np.array_equal(data.split, split_of_ids(data.ids)), "one split alone is none"


def test_2018_with_the_names_published_later(tmp_path, year, open_images, paths_of):
    train, pixels = year(
        "train2018.json", OBFUSCATED_2018, [("tv/Insecta/0/a.png", 0), ("tv/Aves/7/b.png", 7)]
    )
    val, others = year("val2018.json", OBFUSCATED_2018, [("tv/Aves/3/c.png", 3), ("tv/Aves/7/d.png", 7)])
    names = tmp_path / "categories.json"
    for content in (CATEGORIES_2018, {"categories": CATEGORIES_2018}):
        names.write_text(json.dumps(content))
        out = tmp_path / f"{type(content).__name__}.h5"
        import_inat([train, val], out, tmp_path / "images", categories=names, options=SMALL)
        data, found = open_images(out)
        assert data.levels == LEVELS
        assert paths_of(data) == [RANKS_2018[i][1:] for i in (0, 1, 2, 1)]
        assert data.split.tolist() == [0, 0, 1, 1]
        assert data.ids.tolist() == ["tv/Insecta/0/a", "tv/Aves/7/b", "tv/Aves/3/c", "tv/Aves/7/d"]
        assert np.array_equal(found, np.stack(pixels + others))

    import_inat([train, val], tmp_path / "plain.h5", tmp_path / "images", options=SMALL)
    data, _ = open_images(tmp_path / "plain.h5")
    assert paths_of(data)[0] == tuple(f"obfuscated {name}" for name in RANKS_2018[0][1:])


def test_2019_has_no_supercategory(tmp_path, year, open_images, paths_of):
    categories = [{k: v for k, v in c.items() if k != "supercategory"} for c in CATEGORIES_2018]
    train, _ = year("train2019.json", categories, [("tv/a.png", 0), ("tv/b.png", 7), ("tv/c.png", 3)])
    import_inat([train], tmp_path / "out.h5", tmp_path / "images", options=SMALL)
    data, _ = open_images(tmp_path / "out.h5")
    assert data.levels == LEVELS
    assert paths_of(data) == [row[1:] for row in RANKS_2018]


def test_2021(tmp_path, year, open_images, paths_of):
    image = {"latitude": float("nan"), "longitude": 1.5, "location_uncertainty": None}
    mini, _ = year("train_mini.json", CATEGORIES_2021, [("train_mini/00000_Animalia/a.png", 0)])
    content = json.loads(mini.read_text())
    content["images"][0] |= image
    mini.write_text(json.dumps(content))  # NaN is in the published files
    val, _ = year("val.json", CATEGORIES_2021, [("val/00007_Animalia/a.png", 7)])
    out = tmp_path / "out.h5"
    import_inat([val, mini], out, tmp_path / "images", splits=["test", "train"], options=SMALL)
    data, _ = open_images(out)
    assert data.levels == LEVELS
    assert data.split.tolist() == [2, 0]
    assert paths_of(data) == [RANKS_2018[1][1:], RANKS_2018[0][1:]]
    assert data.taxonomy.num_classes == (1, 2, 2, 2, 2, 2, 2), "categories without images are no classes"

    levels = ["supercategory", "order", "specific_epithet"]
    import_inat([mini, val], tmp_path / "b.h5", tmp_path / "images", levels=levels, options=SMALL)
    data, _ = open_images(tmp_path / "b.h5")
    assert data.levels == tuple(levels)
    assert paths_of(data)[0] == ("Insects", "Hymenoptera", "mellifera")


def test_ranks_may_be_missing(tmp_path, year, open_images, paths_of):
    categories = [
        {"id": 0, "name": "A b", "family": "F", "genus": None},
        {"id": 7, "name": "C d", "family": "", "genus": "C", "order": "unknown"},
        {"id": 3, "name": "misc"},
    ]
    train, _ = year("all.json", categories, [("a.png", 0), ("b.png", 7), ("c.png", 3)])
    console = Console(file=io.StringIO(), width=300)
    options = {"unknown": ["MISC"], "options": SMALL, "console": console}
    (tmp_path / "images/c.png").unlink()  # it is not asked for
    import_inat([train], tmp_path / "out.h5", tmp_path / "images", **options)
    data, _ = open_images(tmp_path / "out.h5")
    assert data.levels == ("family", "genus", "species")
    assert data.ids.tolist() == ["a", "b"]
    assert paths_of(data) == [("F", None, "A b"), (None, "C", "C d")]
    assert "note: 1 of 3 rows are unknown at all levels, and left out" in console.file.getvalue()


def test_boxes_of_2017_annotate_an_image_more_than_once(tmp_path, year, open_images, message):
    train, _ = year("train_2017_bboxes.json", CATEGORIES_2017, [("a.png", 0), ("b.png", 7)])
    content = json.loads(train.read_text())
    boxes = [record | {"bbox": [0, 0, 4, 4], "area": 8.0, "iscrowd": 0} for record in content["annotations"]]
    content["annotations"] = boxes * 2
    train.write_text(json.dumps(content))
    import_inat([train], tmp_path / "out.h5", tmp_path / "images", options=SMALL)
    assert len(open_images(tmp_path / "out.h5")[0]) == 2
    content["annotations"][-1] = boxes[-1] | {"category_id": 7}
    train.write_text(json.dumps(content))
    found = message(import_inat, [train], tmp_path / "b.h5", tmp_path / "images", options=SMALL)
    assert found.startswith(f"{train}: annotations: record 3: image ")
    assert "is of category 0 and 7" in found


def test_missing_images(tmp_path, year, open_images, message):
    images = [("train/a.png", 0), ("train/b.png", 7), ("train/c.png", 7)]
    train, _ = year("train.json", CATEGORIES_2017, images)
    (tmp_path / "images/train/a.png").unlink()
    (tmp_path / "images/train/c.png").unlink()
    out = tmp_path / "out.h5"
    found = message(import_inat, [train], out, tmp_path / "images", options=SMALL)
    first, allowed = found.splitlines()
    assert first == f"{tmp_path}/images/train/a.png: there is no such image; 2 of 3 are missing"
    assert "--images is the folder in which 'train' lies; or --skip-broken" in allowed
    import_inat([train], out, tmp_path / "images", options=ImageOptions(size=8, skip_broken=True))
    assert open_images(out)[0].ids.tolist() == ["train/b"]


IMAGES = [("a.png", 0), ("b.png", 7)]


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("test.json", {"without": ["annotations"]}, "has no annotations"),
        ("x.json", {"without": ["images"]}, "images: this list is missing"),
        ("x.json", {"without": ["categories"]},
         "annotations: an annotation has category 0, which is not among the 0 categories"),
        ("x.json", {"categories": CATEGORIES_2017[:1]},
         "annotations: an annotation has category 7, which is not among the 1 categories"),
        ("x.json", {"categories": [{"id": 1}]}, 'categories: record 0 is {"id": 1}'),
        ("x.json", {"annotations": [{"image_id": 5}]}, 'annotations: record 0 is {"image_id": 5}'),
        ("x.json", {"annotations": [5]}, "annotations: record 0 is 5"),
        ("x.json", {"annotations": []}, "images: record 0: image 608 has no annotation"),
        ("x.json", {"images": []}, "images: has no images"),
        ("x.json", {"images": [{"id": 608, "file_name": ""}]}, 'images: record 0: file_name is ""'),
        ("x.json", {"images": [{"id": 608, "file_name": 5}]}, "images: record 0: file_name is 5"),
        ("x.json", {"images": [{"id": 608, "file_name": "/etc/a.png"}]},
         'images: record 0: file_name is "/etc/a.png"'),
        ("x.json", {"images": [{"id": 608, "file_name": "a/../../b.png"}]},
         'images: record 0: file_name is "a/../../b.png"'),
        ("x.json", {"categories": [*CATEGORIES_2017, CATEGORIES_2017[0] | {"name": "another"}]},
         "categories: record 3 is another category 0"),
        ("x.json", {"categories": [*CATEGORIES_2017, {"id": "8", "name": "x"}]},
         'categories: there are the categories 0 and "8"'),
        ("x.json", {"annotations": [{"image_id": 608, "category_id": 7},
                                    {"image_id": 609, "category_id": "7"}]},
         'annotations: there are the categories 7 and "7"'),
        ("x.json", {"categories": [c | {"genus": ["a"]} for c in CATEGORIES_2017]},
         'categories: category 0: genus is ["a"]'),
        ("x.json", {"categories": [c | {"name": True} for c in CATEGORIES_2017]},
         "categories: category 0: name is true"),
        ("x.json", {"categories": [c | {"supercategory": {}} for c in CATEGORIES_2017]},
         "categories: category 0: supercategory is {}"),
    ],
)  # fmt: skip
def test_bad_annotations(tmp_path, year, message, name, changes, expected):
    path, _ = year(name, CATEGORIES_2017, IMAGES)
    content = json.loads(path.read_text()) | {k: v for k, v in changes.items() if k != "without"}
    for key in changes.get("without", ()):
        del content[key]
    path.write_text(json.dumps(content))
    found = message(import_inat, [path], tmp_path / "out.h5", tmp_path / "images", options=SMALL)
    assert found.splitlines()[0] == f"{path}: {expected}"
    assert not (tmp_path / "out.h5").exists()


def test_a_category_may_occur_twice_and_ranks_may_be_numbers(tmp_path, year, open_images, paths_of):
    categories = [category | {"genus": 5} for category in CATEGORIES_2017]
    train, _ = year("x.json", [*categories, categories[0]], IMAGES)
    import_inat([train], tmp_path / "out.h5", tmp_path / "images", options=SMALL)
    data, _ = open_images(tmp_path / "out.h5")
    assert paths_of(data) == [("5", "Apis mellifera"), ("5", "Corvus corax")]


@pytest.mark.parametrize("name", ["a\0", "a\ud800"])
def test_names_that_cannot_be_stored(tmp_path, year, message, name):
    """Before an image is read: there is none."""
    train, _ = year("x.json", [CATEGORIES_2017[0] | {"name": name}, CATEGORIES_2017[1]], IMAGES)
    (tmp_path / "images/a.png").write_text("no image")
    found = message(import_inat, [train], tmp_path / "out.h5", tmp_path / "images", options=SMALL)
    assert found.splitlines() == [
        f"class 1 of level 'name' is named {name!r}",
        "  allowed: text in UTF-8, without NUL, not empty",
    ]
    content = json.loads(train.read_text()) | {"categories": CATEGORIES_2017}
    content["images"][1]["file_name"] = name
    train.write_text(json.dumps(content))
    found = message(import_inat, [train], tmp_path / "out.h5", tmp_path / "images", options=SMALL)
    assert found.splitlines()[0] in (
        f"file name: {name!r} holds NUL",
        f"file name: {name!r} is not UTF-8",
    )


def test_bad_files_and_options(tmp_path, year, message):
    images, out = tmp_path / "images", tmp_path / "out.h5"
    train, _ = year("train.json", CATEGORIES_2017, [("a.png", 0)])
    val, _ = year("val.json", CATEGORIES_2018, [("b.png", 7)])
    other, _ = year("more.json", CATEGORIES_2017, [("c.png", 7)])
    both, _ = year("train_val.json", CATEGORIES_2017, [("d.png", 7)])
    again, _ = year("val_again.json", CATEGORIES_2017, [("a.png", 0)])

    def first_line(files, **options):
        return message(import_inat, files, out, images, options=SMALL, **options).splitlines()[0]

    assert first_line([train, val]) == (
        f"{val}: categories: category 0 is not the same as in the files before it"
    )
    assert first_line([train, other]) == f"{other}: which split is it?"
    assert first_line([both, train]) == f"{both}: which split is it?"
    assert first_line([train, again]) == f"{again}: images: the image 'a.png' is in {train} already"
    assert first_line([train], splits=["trian"]) == "split: is trian"
    assert first_line([train, other], splits=["train"]) == "split: is train"
    assert first_line([train], levels=["order", "name"]) == f"{train}: categories: no category has 'order'"
    assert first_line([train], categories=tmp_path / "no.json").startswith(
        f"{tmp_path / 'no.json'}: cannot be read as JSON"
    )
    (tmp_path / "list.json").write_text("[]")
    assert first_line([tmp_path / "list.json"]) == f"{tmp_path / 'list.json'}: is no file of annotations"
    (tmp_path / "cut.json").write_text('{"images": [')
    assert first_line([tmp_path / "cut.json"]).startswith(f"{tmp_path / 'cut.json'}: cannot be read as JSON")
    (tmp_path / "binary.json").write_bytes(b"\x1f\x8b\xff\xfe")
    assert first_line([tmp_path / "binary.json"]).startswith(
        f"{tmp_path / 'binary.json'}: cannot be read as JSON"
    )
