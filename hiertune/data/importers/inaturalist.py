"""The data sets of the iNaturalist competitions (https://github.com/visipedia/inat_comp)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from hiertune.data.importers.notes import known_rows, quiet
from hiertune.data.importers.pixels import (
    ImageOptions,
    file_rows,
    image_ids,
    label_classes,
    leads_outside,
    require_files,
    split_rows,
    write_images,
)
from hiertune.data.importers.ranks import clean_rank
from hiertune.data.splits import SPLITS
from hiertune.errors import InputError

RANKS = ("kingdom", "phylum", "class", "order", "family", "genus")
"""Ranks above the species, coarse -> fine, as categories name them."""


def import_inat(
    files: Sequence[str | Path],
    out: str | Path,
    images: str | Path,
    *,
    categories: str | Path | None = None,
    levels: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    unknown: Sequence[str] = (),
    options: ImageOptions | None = None,
    console: Console | None = None,
) -> Path:
    """Write a data set of iNaturalist's annotations, in the manner of COCO; returns the path of the file.

    Each file is a JSON object with `images` [{id, file_name, ...}], `annotations` [{image_id,
    category_id, ...}] and `categories` [{id, name, ...}]. What a category has besides depends on the year:

    - 2017: `supercategory` (Plantae, Aves, ...) and no ranks; `name` is mostly a species, but also a genus,
      subspecies or variety. Levels are supercategory, name.
    - 2018: `supercategory`, `kingdom`, `phylum`, `class`, `order`, `family`, `genus`; all names obfuscated.
      The real ones were published later as a list of such categories: `categories.json`.
    - 2019: as 2018, its own `categories.json` included; `supercategory` is not documented.
    - 2021: as 2018, not obfuscated, and `common_name`, `specific_epithet`, `image_dir_name`; `name` is
      the binomial.

    The test files of all years have no annotations. `file_name` is a path below `images`, such as
    `train_val2018/Plantae/7477/x.jpg` or `train_mini/00000_Animalia_.../x.jpg`.

    categories: a file (a list, or an object with `categories`) that replaces those of `files`.
    levels: keys of categories, coarse -> fine; "species" is their `name`. By default the ranks that any
    category names, and species; without ranks supercategory and name.
    splits: train, val or test for each file. By default each file's name says so; if all say the same, or
    none says anything, the split follows from the ids.
    unknown: more names that mean "unknown" (see `clean_rank`). Ids are `file_name` without its suffix.
    Images unknown at all levels are left out.
    Raises InputError for JSON of another kind, a missing or unreadable image.
    """
    images, options, console = Path(images), options or ImageOptions(), console or quiet()
    parts = [_read_annotations(Path(file)) for file in files]
    names = [name for part in parts for name in part.names]
    split = _splits(parts, splits)
    known = _merge_categories(parts) if categories is None else _read_category_file(Path(categories))
    source = parts[0].path if categories is None else Path(categories)
    _check_ids(parts, known, source)
    _check_known(parts, known, categories)
    used = sorted({number for part in parts for number in part.categories})
    levels = _levels([known[number] for number in used], levels, unknown, source)
    lineages = [_lineage(known[number], levels, unknown, source) for number in used]
    place = {number: i for i, number in enumerate(used)}
    class_of_row = np.array([place[number] for part in parts for number in part.categories], np.int64)
    taxonomy, labels = label_classes(lineages, class_of_row, levels)
    _check_distinct(parts)
    kept = known_rows(labels, console)
    names = [names[row] for row in kept]
    ids = image_ids(names)
    allowed = f"--images is the folder in which {Path(names[0]).parts[0]!r} lies"
    require_files(images, names, options, allowed)
    split = split_rows(ids, None if split is None else split[kept], options)
    load = file_rows(images, names, options.size)
    return write_images(out, load, labels[kept], taxonomy, ids, split, options, console)


@dataclass(frozen=True)
class _Annotations:
    """What one file says: row `i` of `names` and `categories` is the same image."""

    path: Path
    names: list[str]
    """`file_name` of each image."""
    categories: list[int]
    """Id of each image's category."""
    known: dict[int, dict[str, Any]]
    """Categories by id."""


def _read_annotations(path: Path) -> _Annotations:
    content = _read_json(path)
    if not isinstance(content, dict):
        raise InputError(
            "is no file of annotations",
            file=path,
            allowed="a JSON object with images, annotations, categories",
        )
    if "annotations" not in content:
        allowed = "a file with annotations: those of the test images were never published"
        raise InputError("has no annotations", file=path, allowed=allowed)
    category_of_image: dict[int, int] = {}
    for record, (image, category) in _records(content, "annotations", path, "image_id", "category_id"):
        if category_of_image.setdefault(image, category) != category:  # 2017 has several boxes in an image
            problem = (
                f"record {record}: image {image} is of category {category_of_image[image]} and {category}"
            )
            raise InputError(problem, file=path, key="annotations", allowed="one category for each image")
    names, categories = [], []
    for record, (image, name) in _records(content, "images", path, "id", "file_name"):
        if image not in category_of_image:
            problem = f"record {record}: image {image} has no annotation"
            raise InputError(problem, file=path, key="images", allowed="one category for each image")
        if not isinstance(name, str) or leads_outside(name):
            problem = f"record {record}: file_name is {_short(name)}"
            raise InputError(problem, file=path, key="images", allowed="a path below --images")
        names.append(name)
        categories.append(category_of_image[image])
    if not names:
        raise InputError("has no images", file=path, key="images")
    known = _categories(content, path) if "categories" in content else {}
    return _Annotations(path, names, categories, known)


def _read_category_file(path: Path) -> dict[int, dict[str, Any]]:
    content = _read_json(path)
    return _categories({"categories": content} if isinstance(content, list) else content, path)


def _categories(content: Any, path: Path) -> dict[int, dict[str, Any]]:
    known: dict[int, dict[str, Any]] = {}
    for record, (number, _) in _records(content, "categories", path, "id", "name"):
        if known.setdefault(number, content["categories"][record]) != content["categories"][record]:
            problem = f"record {record} is another category {number}"
            raise InputError(problem, file=path, key="categories", allowed="one record for each id")
    return known


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        allowed = "JSON, unpacked from its archive"
        raise InputError(f"cannot be read as JSON: {error}", file=path, allowed=allowed) from error


def _records(content: Any, section: str, path: Path, *fields: str) -> Iterator[tuple[int, list[Any]]]:
    """Number and fields of each record of a section; InputError for the first that lacks one."""
    records = content.get(section) if isinstance(content, dict) else None
    if not isinstance(records, list):
        raise InputError(
            "this list is missing", file=path, key=section, allowed=f"records with {', '.join(fields)}"
        )
    for number, record in enumerate(records):
        if not isinstance(record, dict) or any(isinstance(record.get(f), dict | list | None) for f in fields):
            allowed = f"a record with {' and '.join(fields)}"
            raise InputError(f"record {number} is {_short(record)}", file=path, key=section, allowed=allowed)
        yield number, [record[field] for field in fields]


def _short(record: Any) -> str:
    text = json.dumps(record)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _merge_categories(parts: Sequence[_Annotations]) -> dict[int, dict[str, Any]]:
    known: dict[int, dict[str, Any]] = {}
    for part in parts:
        for number, category in part.known.items():
            if known.setdefault(number, category) != category:
                problem = f"category {number} is not the same as in the files before it"
                raise InputError(problem, file=part.path, key="categories", allowed="files of one year")
    return known


def _check_ids(parts: Sequence[_Annotations], known: dict[int, dict[str, Any]], source: Path) -> None:
    """All ids of categories are of one type: else they could not be compared."""
    first = parts[0].categories[0]
    places = [(part.path, "annotations", part.categories) for part in parts]
    for file, key, ids in [*places, (source, "categories", list(known))]:
        for number in ids:
            if type(number) is not type(first):
                problem = f"there are the categories {json.dumps(first)} and {json.dumps(number)}"
                allowed = "ids that are all numbers, or all texts"
                raise InputError(problem, file=file, key=key, allowed=allowed)


def _check_known(
    parts: Sequence[_Annotations], known: dict[int, dict[str, Any]], categories: str | Path | None
) -> None:
    for part in parts:
        for number in part.categories:
            if number not in known:
                raise InputError(
                    f"an annotation has category {number}, which is not among the {len(known):,} categories",
                    file=part.path,
                    key="annotations",
                    allowed="a category of the file" if categories is None else f"a category of {categories}",
                )


def _levels(
    used: Sequence[dict[str, Any]], levels: Sequence[str] | None, unknown: Sequence[str], path: Path
) -> Sequence[str]:
    """The levels, checked; by default the ranks there are."""
    if levels is None:
        ranks = [rank for rank in RANKS if any(_name(category, rank, unknown, path) for category in used)]
        if ranks:
            return [*ranks, "species"]
        named = any(_name(category, "supercategory", unknown, path) for category in used)
        return ["supercategory", "name"] if named else ["name"]
    keys = list(dict.fromkeys(key for category in used for key in category if key != "id"))
    for level in levels:
        if level != "species" and level not in keys:
            allowed = ", ".join([*keys, "species"])
            raise InputError(f"no category has {level!r}", file=path, key="categories", allowed=allowed)
    return levels


def _lineage(
    category: dict[str, Any], levels: Sequence[str], unknown: Sequence[str], path: Path
) -> tuple[str | None, ...]:
    return tuple(_name(category, level, unknown, path) for level in levels)


def _name(category: dict[str, Any], level: str, unknown: Sequence[str], path: Path) -> str | None:
    key = "name" if level == "species" else level
    value = category.get(key)
    if isinstance(value, dict | list | bool):
        problem = f"category {category['id']}: {key} is {_short(value)}"
        raise InputError(problem, file=path, key="categories", allowed="a text or a number")
    return None if value is None else clean_rank(str(value), unknown)


def _splits(parts: Sequence[_Annotations], given: Sequence[str] | None) -> np.ndarray | None:
    """Split of each row; None where the files give none."""
    if given is not None:
        if len(given) != len(parts) or not set(given) <= set(SPLITS):
            allowed = f"{', '.join(SPLITS)}: one for each of the {len(parts)} files, in their order"
            raise InputError(f"is {', '.join(given)}", key="split", allowed=allowed)
        names: list[str | None] = list(given)
    else:
        names = [_split_of_name(part.path.name.lower()) for part in parts]
        if len(set(names)) == 1:
            return None
        if None in names:
            allowed = "a name with one of train, val, test; or --split once for each file"
            raise InputError("which split is it?", file=parts[names.index(None)].path, allowed=allowed)
    counts = [len(part.names) for part in parts]
    return np.repeat([SPLITS.index(name) for name in names if name], counts).astype(np.int8)


def _split_of_name(name: str) -> str | None:
    found = [split for split in SPLITS if split in name]
    return found[0] if len(found) == 1 else None


def _check_distinct(parts: Sequence[_Annotations]) -> None:
    first: dict[str, Path] = {}
    for part in parts:
        for name in part.names:
            if name in first:
                problem = f"the image {name!r} is in {first[name]} already"
                raise InputError(problem, file=part.path, key="images", allowed="each image once")
            first[name] = part.path
