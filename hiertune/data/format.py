"""hiertune's HDF5 files: what is in them, how they are written, and every check on reading.

attributes      format = "hiertune", version = 1
inputs          float [N, D] features, or uint8 [N, H, W, C] images; chunks of whole rows
labels          integer [N, L], -1 = unknown; levels coarse -> fine
ids             strings [N], all different
split           integer [N]: 0 train, 1 val, 2 test
taxonomy/levels         strings [L]
taxonomy/parents/<l>    integer [C_l]: index into level l-1, or -1
taxonomy/names/<l>      strings [C_l]
taxonomy/anchors/<l>    integer [C_l], optional: see `Taxonomy.anchors`
"""

from __future__ import annotations

import difflib
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from pydantic import ValidationError

from hiertune._text import check_storable
from hiertune.config import KmerConfig
from hiertune.data.splits import SPLITS, split_of_ids
from hiertune.errors import InputError
from hiertune.taxonomy import Taxonomy

FORMAT = "hiertune"
VERSION = 1
"""Version of the file format. Raise it also when importers write other content for the same source:
it is part of the key of cached features."""

BLOCK_BYTES = 2**19
"""Rows are written and read in blocks of about this size: whole rows, so that one block is one read."""

_STRING = h5py.string_dtype()


@dataclass(frozen=True)
class RowBlocks:
    """Inputs that are made while they are written: consecutive blocks of rows of one array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Iterable[np.ndarray]
    dropped: list[int] = field(default_factory=list)
    """Rows of `shape` that the blocks leave out: filled, in ascending order, while they are made."""


@dataclass(frozen=True)
class Contents:
    """A file's checked content, but for the inputs' values."""

    labels: np.ndarray
    """int64 [N, L]"""
    ids: np.ndarray
    """object [N] of str"""
    split: np.ndarray
    """int8 [N]"""
    taxonomy: Taxonomy
    input_shape: tuple[int, ...]
    """[N, D] or [N, H, W, C]"""
    input_type: np.dtype
    """float32 or uint8: what the rows are read as."""
    chunk_rows: int
    """Rows that the file stores together; 1 if it does not store rows in chunks."""
    kmer: KmerConfig | None
    """How sequences became these inputs; None where they did not."""


# ------------------------------------------------------------------------------------- writing


def write_dataset(
    path: str | Path,
    inputs: Any,
    labels: np.ndarray,
    taxonomy: Taxonomy,
    ids: Sequence[str],
    split: np.ndarray | None = None,
    *,
    kmer: KmerConfig | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a data set, in one step or not at all; returns the path.

    inputs: array, CPU tensor or RowBlocks; numbers [N, D] (stored as float32) or uint8 images
        [N, H, W, C]. labels: integer [N, L], -1 unknown. split: int [N], see SPLITS; by default
        from the ids (`split_of_ids`). All are given for the rows that RowBlocks drop, too.
        kmer: how sequences became the inputs, where they did.
    Raises InputError for everything that the reader would refuse, and for a file that exists
    unless `overwrite`.
    """
    path = Path(path)
    _refuse_existing(path, overwrite)
    if not path.parent.is_dir():
        raise InputError("its folder does not exist", file=path)
    rows = inputs if isinstance(inputs, RowBlocks) else _blocks_of(np.asarray(inputs))
    dtype = _check_inputs_kind(path, rows.shape, rows.dtype, "biuf")
    names = np.array(list(ids), dtype=object)
    check_storable(names, file=path, key="ids")
    labels = np.asarray(labels)
    split = split_of_ids(names) if split is None else np.asarray(split)
    _check_contents(path, rows.shape[0], labels, names, split, taxonomy)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with h5py.File(temporary, "x") as file:
            file.attrs.update(format=FORMAT, version=VERSION)
            if kmer is not None:
                file.attrs["kmer"] = kmer.model_dump_json()
            _write_taxonomy(file.create_group("taxonomy"), taxonomy)
            _write_inputs(file, rows, dtype, path)
            kept = np.delete(np.arange(rows.shape[0]), rows.dropped)
            file["labels"] = labels[kept].astype(np.int64)
            file["split"] = split[kept].astype(np.int8)
            file.create_dataset("ids", data=names[kept], dtype=_STRING)
        _refuse_existing(path, overwrite)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot be written: {error}", file=path) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise InputError("is a folder", file=path, allowed="the name of a file")
    if path.exists() and not overwrite:
        raise InputError("exists already", file=path, allowed="another name, or overwrite")


def block_rows(shape: tuple[int, ...], itemsize: int, chunk_rows: int = 1) -> int:
    """Rows per block: as many whole chunks as fit in BLOCK_BYTES, at least one."""
    chunk_bytes = chunk_rows * itemsize * math.prod(shape[1:])
    return chunk_rows * max(1, BLOCK_BYTES // chunk_bytes)


def _blocks_of(array: np.ndarray) -> RowBlocks:
    step = block_rows(array.shape, array.itemsize) if array.size else 1
    return RowBlocks(array.shape, array.dtype, (array[i : i + step] for i in range(0, len(array), step)))


def _write_taxonomy(group: h5py.Group, taxonomy: Taxonomy) -> None:
    group.create_dataset("levels", data=list(taxonomy.levels), dtype=_STRING)
    for i in range(taxonomy.num_levels):
        group[f"parents/{i}"] = taxonomy.parents[i]
        group[f"anchors/{i}"] = taxonomy.anchors[i]
        group.create_dataset(f"names/{i}", data=list(taxonomy.names[i]), dtype=_STRING)


def _write_inputs(file: h5py.File, rows: RowBlocks, dtype: np.dtype, path: Path) -> None:
    step = min(block_rows(rows.shape, dtype.itemsize), rows.shape[0])
    dataset = file.create_dataset("inputs", rows.shape, dtype, chunks=(step, *rows.shape[1:]))
    done = 0
    for block in rows.blocks:
        with np.errstate(over="ignore"):  # beyond float32 is inf, and refused as such
            block = block.astype(dtype, copy=False)
        _check_finite(path, block, done)
        dataset[done : done + len(block)] = block
        done += len(block)
    if done + len(rows.dropped) != rows.shape[0]:
        raise ValueError(f"the blocks have {done} rows, but the inputs' shape says {rows.shape}")
    if not done:
        raise InputError("no row is left", file=path, key="inputs", allowed="at least one")
    if rows.dropped:
        dataset.resize(done, axis=0)


# ------------------------------------------------------------------------------------- reading


def open_hdf5(path: Path, **options: int) -> h5py.File:
    """Open for reading, without file locks (they fail on NFS). InputError if it is no whole HDF5 file.

    `options` are those of h5py.File, such as the size of its chunk cache.
    """
    if not path.exists():
        near = difflib.get_close_matches(path.name, os.listdir(path.parent)) if path.parent.is_dir() else []
        hint = f"; near that name: {', '.join(near)}" if near else ""
        raise InputError("there is no such file", file=path, allowed=f"an HDF5 file{hint}")
    if path.is_dir():
        raise InputError("is a folder", file=path, allowed="an HDF5 file")
    if not os.access(path, os.R_OK):
        raise InputError("may not be read", file=path, allowed="a file with read permission")
    if not h5py.is_hdf5(path):
        raise InputError(
            "is not an HDF5 file",
            file=path,
            allowed="an HDF5 file, such as `hiertune data import-...` makes",
        )
    with damage_as_input_error(path):
        return h5py.File(path, "r", locking=False, **options)


def read_contents(path: Path) -> Contents:
    """Read and check everything but the inputs' values. InputError names dataset, row, value, allowed."""
    with open_hdf5(path) as file, damage_as_input_error(path):
        _check_format(file, path)
        inputs = _dataset(file, "inputs", path)
        dtype = _check_inputs_kind(path, inputs.shape, inputs.dtype, "f")
        labels = _dataset(file, "labels", path)[...]
        ids = _read_strings(file, "ids", path)
        split = _dataset(file, "split", path)[...]
        taxonomy = _read_taxonomy(file, path)
        shape, chunk_rows = inputs.shape, inputs.chunks[0] if inputs.chunks else 1
        kmer = _read_kmer(file, path)
    _check_contents(path, shape[0], labels, ids, split, taxonomy)
    return Contents(
        labels.astype(np.int64), ids, split.astype(np.int8), taxonomy, shape, dtype, chunk_rows, kmer
    )


def _read_kmer(file: h5py.File, path: Path) -> KmerConfig | None:
    if "kmer" not in file.attrs:
        return None
    try:
        return KmerConfig.model_validate_json(file.attrs["kmer"])
    except ValidationError as error:
        problem = f"the attribute 'kmer' is {file.attrs['kmer']!r}"
        raise InputError(problem, file=path, allowed='{"k": 1 to 8, "transform": ...}') from error


def read_rows(path: Path, dataset: h5py.Dataset, first: int, out: np.ndarray) -> None:
    """Fill `out` with the rows of the inputs from `first` on; InputError if one is not finite."""
    with damage_as_input_error(path):
        dataset.read_direct(out, np.s_[first : first + len(out)])
    _check_finite(path, out, first)


def _check_finite(path: Path, block: np.ndarray, first_row: int) -> None:
    """InputError naming row, column and value of the first NaN or infinity."""
    finite = np.isfinite(block)
    if not finite.all():
        row, column = (int(i) for i in np.argwhere(~finite)[0])
        raise InputError(
            f"row {first_row + row}, column {column} is {block[row, column]}",
            file=path,
            key="inputs",
            allowed="finite numbers",
        )


@contextmanager
def damage_as_input_error(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (OSError, KeyError, RuntimeError, ValueError, TypeError, OverflowError, MemoryError) as error:
        # h5py has an exception of each kind for one and the same damage
        allowed = "a complete file: copy or import it again"
        raise InputError("is a truncated or damaged HDF5 file", file=path, allowed=allowed) from error


def _check_format(file: h5py.File, path: Path) -> None:
    if file.attrs.get("format") != FORMAT:
        found = file.attrs.get("format", "missing")
        raise InputError(
            f"is HDF5, but not a data set of hiertune: its attribute 'format' is {found}",
            file=path,
            allowed=f"format = {FORMAT!r}; `hiertune data import-...` makes them",
        )
    if file.attrs.get("version") != VERSION:
        found = file.attrs.get("version", "missing")
        raise InputError(f"has format version {found}", file=path, allowed=f"version {VERSION}")


def _dataset(file: h5py.File, name: str, path: Path) -> h5py.Dataset:
    found = file.get(name)
    if isinstance(found, h5py.Dataset):
        require_own(file, found, name, path)
    else:
        raise InputError(
            "this dataset is missing", file=path, key=name, allowed="inputs, labels, ids, split, taxonomy/"
        )
    return found


def require_own(file: h5py.File, dataset: h5py.Dataset, name: str, path: Path) -> None:
    """InputError for a dataset whose values lie in other files, whatever those may be: behind an external
    link, in a virtual dataset, or in raw files. Who gets a file reads that file, and no other of theirs."""
    if dataset.file.filename != file.filename or dataset.is_virtual or dataset.external:
        allowed = "a file that holds its values: `h5repack` or an import makes one"
        raise InputError("its values lie in another file", file=path, key=name, allowed=allowed)


def _read_strings(file: h5py.File, name: str, path: Path) -> np.ndarray:
    dataset = _dataset(file, name, path)
    if h5py.check_string_dtype(dataset.dtype) is None or dataset.ndim != 1:
        raise _wrong(path, name, dataset, "strings [rows]" if name == "ids" else "strings, one per class")
    try:
        return dataset.asstr()[...]
    except UnicodeDecodeError as error:
        raise InputError("has text that is not UTF-8", file=path, key=name) from error


def _read_taxonomy(file: h5py.File, path: Path) -> Taxonomy:
    levels = _read_strings(file, "taxonomy/levels", path).tolist()
    numbers = range(len(levels))
    parents = [_dataset(file, f"taxonomy/parents/{i}", path)[...] for i in numbers]
    names = [_read_strings(file, f"taxonomy/names/{i}", path).tolist() for i in numbers]
    anchors = None
    if "taxonomy/anchors" in file:
        anchors = [_dataset(file, f"taxonomy/anchors/{i}", path)[...] for i in numbers]
    try:
        return Taxonomy.from_parents(levels, parents, names, anchors)
    except InputError as error:
        raise _placed(error, path, "taxonomy") from None


# -------------------------------------------------------------------------------------- checks


def _check_contents(
    path: Path, rows: int, labels: np.ndarray, ids: np.ndarray, split: np.ndarray, taxonomy: Taxonomy
) -> None:
    for name, array in (("labels", labels), ("ids", ids), ("split", split)):
        if array.shape[:1] != (rows,):
            found = f"{len(array)} rows" if array.ndim else "no rows"
            raise InputError(f"has {found}, but inputs has {rows}", file=path, key=name)
    try:
        taxonomy.check_labels(labels)
    except InputError as error:
        raise _placed(error, path, "labels") from None
    if split.ndim != 1 or split.dtype.kind not in "iu":
        raise _wrong(path, "split", split, "integers [rows]")
    bad = (split < 0) | (split >= len(SPLITS))
    if bad.any():
        row = int(np.argmax(bad))
        allowed = ", ".join(f"{i} ({name})" for i, name in enumerate(SPLITS))
        raise InputError(f"row {row} is {split[row]}", file=path, key="split", allowed=allowed)
    _check_ids(path, ids)


def _check_ids(path: Path, ids: np.ndarray) -> None:
    if len(set(ids)) == len(ids):
        return
    first: dict[str, int] = {}
    for row, name in enumerate(ids):
        if name in first:
            raise InputError(
                f"row {row} has the id {name!r} of row {first[name]}",
                file=path,
                key="ids",
                allowed="ids that are all different",
            )
        first[name] = row


def _check_inputs_kind(path: Path, shape: tuple[int, ...], dtype: np.dtype, features: str) -> np.dtype:
    """The type that the inputs are stored as; `features` are the numpy kinds allowed for [N, D]."""
    if 0 not in shape:
        if len(shape) == 2 and dtype.kind in features:
            return np.dtype(np.float32)
        if len(shape) == 4 and dtype == np.uint8:
            return np.dtype(np.uint8)
    raise InputError(
        f"is {dtype} of shape {shape}",
        file=path,
        key="inputs",
        allowed="float features [rows, features] or uint8 images [rows, height, width, channels]; none zero",
    )


def _wrong(path: Path, name: str, array: Any, allowed: str) -> InputError:
    return InputError(f"is {array.dtype} of shape {array.shape}", file=path, key=name, allowed=allowed)


def _placed(error: InputError, path: Path, key: str) -> InputError:
    """The same problem, said of a dataset of a file."""
    key = f"{key}: {error.key}" if error.key else key
    return InputError(error.problem, file=path, key=key, allowed=error.allowed)
