"""Folders of images: one folder per class and a table of lineages, or folders that are the taxonomy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from rich.console import Console

from hiertune.data.importers.notes import known_rows, quiet, tell
from hiertune.data.importers.pixels import (
    IMAGE_SUFFIXES,
    ImageOptions,
    file_rows,
    find_images,
    image_ids,
    label_classes,
    split_rows,
    write_images,
)
from hiertune.data.importers.ranks import clean_rank
from hiertune.data.importers.table import Table
from hiertune.errors import InputError

SPLIT_FOLDERS = {"train": 0, "val": 1, "valid": 1, "validation": 1, "test": 2}
"""Split number of a top folder's name, whatever its case."""

Folders = tuple[str, ...]
Ranks = tuple["str | None", ...]


def import_images(
    folder: str | Path,
    out: str | Path,
    table: str | Path | None = None,
    levels: Sequence[str] | None = None,
    *,
    class_column: str | None = None,
    unknown: Sequence[str] = (),
    options: ImageOptions | None = None,
    console: Console | None = None,
) -> Path:
    """Write a data set of the images below a folder; returns the path of the file.

    With a table (CSV, TSV, Parquet): images lie in FOLDER/<class>/, at any depth, and the table has a row
    for each class: its folder's name in `class_column` (by default the first), its lineage in the columns
    `levels` (by default all others), coarse -> fine.
    Without one, the folders are the taxonomy: FOLDER/<order>/<family>/<genus>/x.jpg with `levels` order,
    family, genus; images that lie higher up are unknown in the finer levels.
    In both, if all top folders with images are named train, val (valid, validation) or test, whatever the
    case, they are the splits, and everything else lies below them; one split alone is none.
    unknown: more names that mean "unknown" (see `clean_rank`). Ids are paths below FOLDER. Images unknown at
    all levels are left out.
    Raises InputError for a class that is not in the table, a path that is too deep, an unreadable image, and
    where only some top folders are named like splits.
    """
    folder, options, console = Path(folder), options or ImageOptions(), console or quiet()
    names = _find_images(folder, console)
    split, paths = _split_folders(folder, names)
    if table is None:
        levels, lineages = _nested_lineages(folder, names, paths, levels, unknown)
    else:
        levels, lineages = _table_lineages(folder, names, paths, Path(table), levels, class_column, unknown)
    number = {path: i for i, path in enumerate(lineages)}
    class_of_row = np.fromiter((number[path] for path in paths), np.int64, len(paths))
    taxonomy, labels = label_classes(list(lineages.values()), class_of_row, levels)
    kept = known_rows(labels, console)
    names = [names[row] for row in kept]
    ids = image_ids(names)
    split = split_rows(ids, None if split is None else split[kept], options)
    load = file_rows(folder, names, options.size)
    return write_images(out, load, labels[kept], taxonomy, ids, split, options, console)


def _find_images(folder: Path, console: Console) -> list[str]:
    """Paths below `folder` of all images, sorted, with "/"; nothing hidden."""
    if not folder.is_dir():
        raise InputError("there is no such folder", file=folder)
    found = find_images(folder)
    if not found.images:
        raise InputError("has no images", file=folder, allowed=", ".join(IMAGE_SUFFIXES))
    if found.others:
        kinds = Counter(PurePosixPath(name).suffix or PurePosixPath(name).name for name in found.others)
        shown = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(5))
        tell(console, f"{len(found.others):,} other files are left out: {shown}")
    if found.repeated:
        shown = ", ".join(found.repeated[:5]) + (", ..." if len(found.repeated) > 5 else "")
        tell(console, f"links to folders that are read anyway are left out: {shown}")
    return found.images


def _split_folders(folder: Path, names: Sequence[str]) -> tuple[np.ndarray | None, list[Folders]]:
    """Split of each image, if the top folders are splits, and the folders that say its class."""
    folders = [PurePosixPath(name).parts[:-1] for name in names]
    tops = {path[0] if path else "." for path in folders}
    splits = {top for top in tops if top.casefold() in SPLIT_FOLDERS}
    if not splits:
        return None, folders
    if splits < tops:
        problem = f"has images in {_shown(splits)}, which name splits, and in {_shown(tops - splits)}, which "
        allowed = f"either splits alone ({', '.join(SPLIT_FOLDERS)}) or none"
        raise InputError(f"{problem}do not", file=folder, allowed=allowed)
    below = [path[1:] for path in folders]
    split = np.array([SPLIT_FOLDERS[path[0].casefold()] for path in folders], np.int8)
    return (split if len(set(split.tolist())) > 1 else None), below


def _shown(names: Iterable[str]) -> str:
    """The first five names."""
    names = sorted(names)
    return ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")


def _nested_lineages(
    folder: Path,
    names: Sequence[str],
    paths: Sequence[Folders],
    levels: Sequence[str] | None,
    unknown: Sequence[str],
) -> tuple[Sequence[str], dict[Folders, Ranks]]:
    """Level names, and the lineage of each path of folders: the path itself."""
    depth = max(map(len, paths))
    if levels is None:
        allowed = f"--levels with {depth} names for the folders, coarse to fine; or --taxonomy TABLE"
        raise InputError("without a table, the levels need names", file=folder, allowed=allowed)
    for name, path in zip(names, paths, strict=True):
        if not 1 <= len(path) <= len(levels):
            found = f"{len(path)} folders" if path else "no folder"
            allowed = f"1 to {len(levels)}, as there are {len(levels)} levels: {', '.join(levels)}"
            raise InputError(
                f"lies in {found} that could name its class", file=folder / name, allowed=allowed
            )
    gaps = (None,) * len(levels)
    return levels, {
        path: (*(clean_rank(name, unknown) for name in path), *gaps)[: len(levels)] for path in set(paths)
    }


def _table_lineages(
    folder: Path,
    names: Sequence[str],
    paths: Sequence[Folders],
    table: Path,
    levels: Sequence[str] | None,
    class_column: str | None,
    unknown: Sequence[str],
) -> tuple[Sequence[str], dict[Folders, Ranks]]:
    """Level names, and the lineage of each path of folders: that of its first folder in the table."""
    for name, path in zip(names, paths, strict=True):
        if not path:
            allowed = f"{folder.name}/CLASS/{PurePosixPath(name).name}"
            raise InputError("lies in no folder of a class", file=folder / name, allowed=allowed)
    content = Table.read(table)
    class_column = class_column or content.text_columns[0]
    content.check_columns([class_column])
    if levels is None:
        levels = [name for name in content.text_columns if name != class_column]
    if not levels:
        problem = f"has no column besides {class_column!r}"
        raise InputError(problem, file=table, allowed="columns with the lineage of each class")
    content.check_columns(levels)
    known = _lineage_of_class(content, class_column, levels, unknown)
    missing = sorted({path[0] for path in paths} - known.keys())
    if missing:
        raise InputError(
            f"has no row for {len(missing):,} of the folders in {folder}: {_shown(missing)}",
            file=table,
            key=class_column,
            allowed="a row for each folder of a class",
        )
    return levels, {path: known[path[0]] for path in set(paths)}


def _lineage_of_class(
    table: Table, class_column: str, levels: Sequence[str], unknown: Sequence[str]
) -> dict[str, Ranks]:
    columns = [[clean_rank(name, unknown) for name in table.texts(level)] for level in levels]
    lineages: dict[str, Ranks] = {}
    classes = [name.strip() for name in table.texts(class_column)]
    for row, (name, ranks) in enumerate(zip(classes, zip(*columns, strict=True), strict=True)):
        if lineages.setdefault(name, ranks) != ranks:
            allowed = "one lineage for each class"
            raise table.bad_cell(row, class_column, allowed, " again, with another lineage")
    return lineages
