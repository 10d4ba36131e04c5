"""Data sets of Linnaeus (https://github.com/polli-labs/linnaeus): `labels.h5` and images beside it.

What `labels.h5` holds, of N rows (its documentation's docs/training/data_loading.md):

img_identifiers   strings [N]: file names of the images, or what comes before their extension
taxa_L<rank>      uint32 [N]: id of the taxon at that rank (L10 species, L20 genus, ... L70 kingdom);
                  0 = unknown
everything else   where, when and how high (spatial, temporal, elevation_...), scores: not read here

Linnaeus counts ranks, tasks and names from fine to coarse; here they are turned round.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from rich.console import Console

from hiertune.data.format import damage_as_input_error, open_hdf5, require_own
from hiertune.data.importers.notes import known_rows, quiet, tell
from hiertune.data.importers.pixels import (
    ImageOptions,
    LoadRow,
    file_rows,
    fit_array,
    image_ids,
    leads_outside,
    require_files,
    split_rows,
    write_images,
)
from hiertune.data.importers.table import Table
from hiertune.errors import InputError
from hiertune.taxonomy import Taxonomy

RANK_NUMBERS = {
    "species": 10,
    "genus": 20,
    "family": 30,
    "order": 40,
    "class": 50,
    "phylum": 60,
    "kingdom": 70,
}
"""iNaturalist's numbers of the main ranks: higher is coarser."""

_TAXA = re.compile(r"taxa_L(\d+(?:[._]\d+)?)")


def import_linnaeus(
    labels: str | Path,
    out: str | Path,
    images: str | Path,
    *,
    extension: str = "",
    levels: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    taxa: str | Path | None = None,
    options: ImageOptions | None = None,
    console: Console | None = None,
) -> Path:
    """Write a data set from Linnaeus' `labels.h5` and its images; returns the path of the file.

    images: an HDF5 file with `images` uint8 [M, H, W, 3], in the order of `labels` or with
    `img_identifiers` of its own; or a folder with IMAGES/<img_identifier><extension>.
    levels: which of the `taxa_L<rank>` to take, coarse -> fine; by default all that have labels.
    names: what to call these levels, coarse -> fine as everywhere in hiertune (`order`, `family`, ...).
    taxa: a table (CSV, TSV, Parquet) with columns `id` and `name`; without it, classes are named by ids.

    Labels stay as they are, 0 becomes unknown (-1), and rows unknown at all levels are left out. A taxon's
    parent is the one that it is seen with in any row, so a row that leaves the parent out makes no
    second class; a taxon that is seen with no parent is an orphan. Taxa seen under two parents, mostly a
    mistake in the data, become one class under each, and `console` names them.
    Ids are the identifiers, without the suffix of an image. Metadata other than taxa is not taken over.
    Raises InputError for files of another kind, names in the wrong order, a missing or unreadable image.
    """
    labels, images = Path(labels), Path(images)
    options, console = options or ImageOptions(), console or quiet()
    content = _read_labels(labels, levels, names, console)
    taxonomy, encoded = _encode(content, None if taxa is None else Path(taxa), console)
    kept = known_rows(encoded, console)
    identifiers = [content.identifiers[row] for row in kept]
    ids = image_ids(identifiers)
    split = split_rows(ids, None, options)
    with _image_rows(images, content, kept, extension, options) as load:
        return write_images(out, load, encoded[kept], taxonomy, ids, split, options, console)


# -------------------------------------------------------------------------------------- labels


@dataclass(frozen=True)
class _Labels:
    path: Path
    identifiers: list[str]
    levels: list[str]
    """Names, coarse -> fine."""
    taxa: np.ndarray
    """int64 [N, L] taxon ids, coarse -> fine; 0 = unknown."""


def _read_labels(
    path: Path, levels: Sequence[str] | None, names: Sequence[str] | None, console: Console
) -> _Labels:
    with open_hdf5(path) as file, damage_as_input_error(path):
        identifiers = _identifiers(file, path)
        found = sorted((name for name in file if _TAXA.fullmatch(name)), key=_rank_number, reverse=True)
        if not found:
            raise InputError("has no labels", file=path, allowed="datasets taxa_L10, taxa_L20, ...")
        chosen = found if levels is None else _check_levels(path, levels, found)
        shown = list(chosen) if names is None else _check_names(path, names, chosen)
        taxa = np.stack([_taxon_ids(file, name, len(identifiers), path) for name in chosen], axis=1)
        left_out = sorted(name for name in file if name not in {"img_identifiers", "metadata", *found})
    if left_out:
        tell(console, f"only labels and images are taken over, not {', '.join(left_out)}")
    used = [bool(column.any()) for column in taxa.T]
    if levels is None and any(used) and not all(used):
        empty = [name for name, has_labels in zip(chosen, used, strict=True) if not has_labels]
        tell(console, f"no row has a label at {', '.join(empty)}: no levels are made of them")
        shown, taxa = [name for name, has in zip(shown, used, strict=True) if has], taxa[:, used]
    return _Labels(path, identifiers, shown, taxa)


def _rank_number(name: str) -> float:
    match = _TAXA.fullmatch(name)
    assert match is not None
    return float(match[1].replace("_", "."))


def _identifiers(file: h5py.File, path: Path) -> list[str]:
    dataset = file.get("img_identifiers")
    if not isinstance(dataset, h5py.Dataset) or dataset.ndim != 1 or not len(dataset):
        allowed = "strings [rows], at least one"
        raise InputError(
            "this dataset is missing or of another kind", file=path, key="img_identifiers", allowed=allowed
        )
    require_own(file, dataset, "img_identifiers", path)
    values = dataset[...]
    texts = []
    for row, value in enumerate(values):
        try:
            texts.append(value.decode() if isinstance(value, bytes) else str(value))
        except UnicodeDecodeError as error:
            problem = f"row {row} is {bytes(value)!r}"
            raise InputError(problem, file=path, key="img_identifiers", allowed="text in UTF-8") from error
    if len(set(texts)) < len(texts):
        twice = Counter(texts).most_common(1)[0][0]
        raise InputError(
            f"{twice!r} occurs twice", file=path, key="img_identifiers", allowed="each image once"
        )
    return texts


def _check_levels(path: Path, levels: Sequence[str], found: Sequence[str]) -> list[str]:
    for level in levels:
        if level not in found:
            raise InputError(f"has no dataset {level!r}", file=path, allowed=", ".join(found))
    right = sorted(set(levels), key=_rank_number, reverse=True)
    if list(levels) != right:
        raise InputError(
            f"the levels {', '.join(levels)} are not coarse to fine", file=path, allowed=", ".join(right)
        )
    return right


def _check_names(path: Path, names: Sequence[str], chosen: Sequence[str]) -> list[str]:
    if len(names) != len(chosen):
        allowed = f"{len(chosen)} names, for {', '.join(chosen)}"
        raise InputError(f"{len(names)} names are given", file=path, allowed=allowed)
    for name, dataset in zip(names, chosen, strict=True):
        number = RANK_NUMBERS.get(name)
        if number is not None and number != _rank_number(dataset):
            allowed = f"names from coarse to fine, for {', '.join(chosen)}; {name} is L{number}"
            raise InputError(f"{dataset} is named {name!r}", file=path, allowed=allowed)
    return list(names)


def _taxon_ids(file: h5py.File, name: str, rows: int, path: Path) -> np.ndarray:
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.dtype.kind not in "iu" or dataset.shape != (rows,):
        found = (
            f"{dataset.dtype} of shape {dataset.shape}" if isinstance(dataset, h5py.Dataset) else "a group"
        )
        raise InputError(f"is {found}", file=path, key=name, allowed=f"integers [{rows}]")
    require_own(file, dataset, name, path)
    values = dataset[...].astype(np.int64)
    if (values < 0).any():
        row = int(np.argmax(values < 0))
        raise InputError(f"row {row} is {values[row]}", file=path, key=name, allowed="taxon ids; 0 = unknown")
    return values


# ------------------------------------------------------------------------------------ taxonomy


def _encode(content: _Labels, taxa: Path | None, console: Console) -> tuple[Taxonomy, np.ndarray]:
    """Taxonomy, and labels int64 [N, L], -1 where the file has 0."""
    distinct, of_row = np.unique(content.taxa, axis=0, return_inverse=True)
    of_row = of_row.reshape(-1)
    filled = _with_known_ancestors(distinct)
    _report_conflicts(filled, np.bincount(of_row), content.levels, console)
    names = _class_names(distinct, taxa)
    lineages = [
        tuple(names[level].get(number) for level, number in enumerate(row)) for row in filled.tolist()
    ]
    taxonomy = Taxonomy.from_lineages(lineages, content.levels)
    labels = taxonomy.encode(lineages)[of_row]
    labels[content.taxa == 0] = -1
    return taxonomy, labels


def _with_known_ancestors(lineages: np.ndarray) -> np.ndarray:
    """Lineages [U, L] of taxon ids with each 0 above a taxon filled where all other rows agree on it.

    A taxon id is one taxon wherever it stands: without this, a row that leaves out the parent would
    make it a second class, an orphan.
    """
    filled = lineages.copy()
    for level in range(filled.shape[1] - 1, 0, -1):
        for above in range(level - 1, -1, -1):
            known = (filled[:, level] > 0) & (filled[:, above] > 0)
            pairs = np.unique(filled[known][:, [level, above]], axis=0)
            child, first, parents = np.unique(pairs[:, 0], return_index=True, return_counts=True)
            child, parent = child[parents == 1], pairs[first[parents == 1], 1]
            rows = np.flatnonzero((filled[:, above] == 0) & np.isin(filled[:, level], child))
            filled[rows, above] = parent[np.searchsorted(child, filled[rows, level])]
    return filled


def _report_conflicts(
    lineages: np.ndarray, rows: np.ndarray, levels: Sequence[str], console: Console
) -> None:
    """Say which taxa stand under two parents; `rows` [U] counts each lineage.

    A parent is the nearest known taxon above: what differs further up is then told of the parent alone.
    """
    conflicts: list[str] = []
    nearest = np.full((len(lineages), 2), -1)  # level and taxon
    for level in range(lineages.shape[1]):
        known = np.flatnonzero(lineages[:, level])
        taxa = lineages[known, level]
        links, of_row = np.unique(np.column_stack([taxa, nearest[known]]), axis=0, return_inverse=True)
        counts = np.bincount(of_row.reshape(-1), rows[known])
        children, first, parents = np.unique(links[:, 0], return_index=True, return_counts=True)
        for child, start, number in zip(children, first, parents, strict=True):
            if number > 1:
                seen = (_seen_under(links[i], int(counts[i]), levels) for i in range(start, start + number))
                conflicts.append(f"{levels[level]} {child} under {' and '.join(seen)}")
        nearest[known] = np.column_stack([np.full(len(known), level), taxa])
    if conflicts:
        shown = "; ".join(conflicts[:5]) + ("; ..." if len(conflicts) > 5 else "")
        found = "1 taxon is" if len(conflicts) == 1 else f"{len(conflicts):,} taxa are"
        tell(console, f"{found} seen under several parents, and made a class under each of them: {shown}")


def _seen_under(link: np.ndarray, count: int, levels: Sequence[str]) -> str:
    _, level, taxon = link
    name = f"{levels[level]} {taxon}" if level >= 0 else "nothing known"
    return f"{name} ({count:,} row{'s' if count > 1 else ''})"


def _class_names(lineages: np.ndarray, table: Path | None) -> list[dict[int, str]]:
    """Per level: the name of each taxon id; with its id where two taxa of a level share a name."""
    ids = [np.unique(column[column > 0]).tolist() for column in lineages.T]
    if table is None:
        return [{number: str(number) for number in of_level} for of_level in ids]
    content = Table.read(table)
    content.check_columns(["id", "name"])
    name_of: dict[str, str] = {}
    rows = zip(map(str.strip, content.texts("id")), map(str.strip, content.texts("name")), strict=True)
    for row, (number, name) in enumerate(rows):
        if name_of.setdefault(number, name) != name:
            raise content.bad_cell(row, "id", "one name for each taxon", " again, with another name")
    missing = [number for of_level in ids for number in of_level if not name_of.get(str(number))]
    if missing:
        shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        problem = f"has no name for {len(missing):,} of the taxa: {shown}"
        raise InputError(problem, file=table, key="name", allowed="a row for each taxon")
    names = []
    for of_level in ids:
        counts = Counter(name_of[str(number)] for number in of_level)
        plain = {number: name_of[str(number)] for number in of_level}
        names.append({n: name if counts[name] == 1 else f"{name} ({n})" for n, name in plain.items()})
    return names


# -------------------------------------------------------------------------------------- images


@contextmanager
def _image_rows(
    images: Path, labels: _Labels, kept: np.ndarray, extension: str, options: ImageOptions
) -> Iterator[LoadRow]:
    """What reads the image of each kept row."""
    if images.is_dir():
        names = [labels.identifiers[row] + extension for row in kept]
        for row, name in zip(kept, names, strict=True):
            if leads_outside(name):
                problem = f"row {row} is {labels.identifiers[row]!r}"
                raise InputError(
                    problem, file=labels.path, key="img_identifiers", allowed="a path below --images"
                )
        allowed = "--images DIR --extension .jpg, so that DIR/<img_identifier>.jpg is the image"
        require_files(images, names, options, allowed)
        yield file_rows(images, names, options.size)
        return
    if extension:
        raise InputError(f"is {extension!r}", key="extension", allowed="only with a folder of images")
    with open_hdf5(images, rdcc_nbytes=_CHUNK_CACHE) as file:
        with damage_as_input_error(images):
            load = _hdf5_rows(file, images, labels, kept, options)
        yield load


_CHUNK_CACHE = 2**26
"""Bytes of uncompressed chunks that HDF5 keeps: rows that follow one another share them."""


def _holds_images(found: Any) -> bool:
    """uint8 [M, H, W, 3], none zero."""
    if not isinstance(found, h5py.Dataset) or found.dtype != np.uint8:
        return False
    return found.shape[3:] == (3,) and 0 not in found.shape


def _hdf5_rows(
    file: h5py.File, path: Path, labels: _Labels, kept: np.ndarray, options: ImageOptions
) -> LoadRow:
    images: Any = file.get("images")
    if not _holds_images(images):
        found = f"{images.dtype} of shape {images.shape}" if isinstance(images, h5py.Dataset) else "missing"
        allowed = "uint8 [images, height, width, 3], none zero"
        raise InputError(f"is {found}", file=path, key="images", allowed=allowed)
    require_own(file, images, "images", path)
    if "img_identifiers" in file:
        own = _identifiers(file, path)
        if len(own) != len(images):
            problem = f"has {len(images):,} rows, but its img_identifiers {len(own):,}"
            raise InputError(problem, file=path, key="images", allowed="an identifier for each image")
        place = {name: i for i, name in enumerate(own)}
        wanted = [place.get(labels.identifiers[row], -1) for row in kept]
        missing = [labels.identifiers[row] for row, i in zip(kept, wanted, strict=True) if i < 0]
        if missing and not options.skip_broken:
            problem = f"has no image for {len(missing):,} of {len(kept):,} rows, such as {missing[0]!r}"
            allowed = f"each identifier of {labels.path}; or --skip-broken"
            raise InputError(problem, file=path, key="img_identifiers", allowed=allowed)
    elif len(images) != len(labels.identifiers):
        raise InputError(
            f"has {len(images):,} rows, but {labels.path} has {len(labels.identifiers):,}",
            file=path,
            key="images",
            allowed="images in the order of the labels, or img_identifiers beside them",
        )
    else:
        wanted = kept.tolist()

    def load(row: int) -> np.ndarray:
        if wanted[row] < 0:
            raise InputError("there is no such image", file=path, key=labels.identifiers[kept[row]])
        with damage_as_input_error(path):
            return fit_array(images[wanted[row]], options.size)

    return load
