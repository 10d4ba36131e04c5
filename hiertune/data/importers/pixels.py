"""What the importers of images share: finding, decoding and resizing by threads, ids, splits, writing."""

from __future__ import annotations

import os
import posixpath
import stat
import struct
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hiertune._text import check_storable
from hiertune.data.format import RowBlocks, block_rows, write_dataset
from hiertune.data.importers.notes import tell
from hiertune.data.splits import SPLITS, hold_out, split_of_ids
from hiertune.errors import InputError
from hiertune.taxonomy import Lineage, Taxonomy

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

MOST_PIXELS = 4096
"""Largest height and width of an import."""

LoadRow = Callable[[int], np.ndarray]
"""Pixels of one row, uint8 [size, size, 3]; InputError if it is broken. Called by several threads."""


@dataclass(frozen=True)
class ImageOptions:
    """What can be said of every import of images."""

    size: int = 224
    """Height and width: the shorter side is resized to it, and the longer one cut to it at the centre."""
    skip_broken: bool = False
    """Leave out images that are missing or cannot be decoded, instead of ending with InputError."""
    val_share: float = 0.0
    """Share of the training rows that become validation rows (see `hold_out`); of all rows, where the
    source has no splits."""
    test_share: float = 0.0
    """The same for test rows. With neither, a source without splits is split by `split_of_ids`."""
    threads: int | None = None
    """Threads that decode; by default one per core. The result does not depend on it."""
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.size <= MOST_PIXELS:
            raise InputError(f"is {self.size}", key="size", allowed=f"1 to {MOST_PIXELS}")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"is {self.threads}", key="threads", allowed="1 or more")
        for name, share in (("val_share", self.val_share), ("test_share", self.test_share)):
            if not 0 <= share < 1:
                raise InputError(f"is {share}", key=name, allowed="0 or more, below 1")
        if self.val_share + self.test_share >= 1:
            total = self.val_share + self.test_share
            raise InputError(f"together they are {total}", key="val_share, test_share", allowed="below 1")


# -------------------------------------------------------------------------------------- pixels


def read_image(path: str | Path, size: int) -> np.ndarray:
    """An image file as uint8 [size, size, 3]; InputError names a file that cannot be read.

    RGB, turned as its EXIF orientation says; the shorter side is resized to `size` (bicubic,
    antialiased) and the longer one cut to it at the centre. An image of that size keeps its pixels.
    Transparency is dropped; of 16-bit greys the upper 8 bits are kept.
    """
    pillow = _pillow()
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for ever
            raise InputError("is no regular file", file=path)
        with pillow.Image.open(path) as image:
            # a JPEG can be decoded at 1/2, 1/4 or 1/8: twice the size that is wanted loses nothing visible
            image.draft(None, (2 * size, 2 * size))
            pillow.ImageOps.exif_transpose(image, in_place=True)
            return fit_image(image, size)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError("there is no such image", file=path) from error
    except (*_DAMAGE, pillow.Image.DecompressionBombError) as error:
        raise InputError(f"cannot be read as an image: {error}", file=path) from error


# what Pillow's readers raise for damaged files, each format its own
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
)


def fit_image(image: Image, size: int) -> np.ndarray:
    """See `read_image`; but without turning."""
    pillow = _pillow()
    if image.mode.startswith("I;16"):
        image = pillow.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its pixels have no fixed range (mode {image.mode})")
    if image.mode != "RGB":
        image = image.convert("RGB")
    return np.asarray(pillow.ImageOps.fit(image, (size, size), pillow.Image.Resampling.BICUBIC))


def fit_array(pixels: np.ndarray, size: int) -> np.ndarray:
    """`fit_image` for uint8 [H, W, 3]."""
    if pixels.shape[:2] == (size, size):
        return pixels
    return fit_image(_pillow().Image.fromarray(pixels), size)


def _pillow() -> Any:
    """Pillow is in the extra `vision`: who imports no images does not need it."""
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        allowed = "pip install 'hiertune[vision]'"
        raise InputError(
            "images are read with Pillow, which is not installed", key="pillow", allowed=allowed
        ) from error
    return PIL


# --------------------------------------------------------------------------------------- files


@dataclass
class FoundFiles:
    """What is below a folder: paths below it, with "/"."""

    images: list[str] = field(default_factory=list)
    """Sorted."""
    others: list[str] = field(default_factory=list)
    """Files of other kinds, and what is named like an image but is no regular file."""
    repeated: list[str] = field(default_factory=list)
    """Links to folders that have been read by another path."""


def find_images(folder: Path) -> FoundFiles:
    """All files below a folder, nothing hidden; InputError if one of its folders cannot be read.

    Links are followed, but each folder is read once, and by its own path if that is below `folder`.
    """
    found, read = FoundFiles(), set[tuple[int, int]]()
    links = [""]
    for link in links:  # it grows meanwhile: by links, which come after all that needs none
        folders = [link]
        while folders:
            here = folders.pop()
            try:
                status = os.stat(folder / here)
                if (status.st_dev, status.st_ino) in read:
                    found.repeated.append(here)
                    continue
                read.add((status.st_dev, status.st_ino))
                with os.scandir(folder / here) as listing:
                    entries = sorted(listing, key=lambda entry: entry.name)
            except OSError as error:
                raise InputError(f"cannot be read ({error.strerror})", file=folder / here) from error
            for entry in entries:
                if not entry.name.startswith("."):
                    _sort_in(entry, f"{here}/{entry.name}" if here else entry.name, found, folders, links)
    found.images.sort()
    return found


def _sort_in(
    entry: os.DirEntry[str], name: str, found: FoundFiles, folders: list[str], links: list[str]
) -> None:
    is_link = entry.is_symlink()
    if os.path.isdir(entry) if is_link else entry.is_dir():
        (links if is_link else folders).append(name)
        return
    # a link to nothing is a broken image
    regular = (os.path.isfile(entry) or not os.path.exists(entry)) if is_link else entry.is_file()
    is_image = regular and name.lower().endswith(IMAGE_SUFFIXES)
    (found.images if is_image else found.others).append(name)


def leads_outside(name: str) -> bool:
    """Whether a name (a path with "/") is of no file below the folder that it starts in."""
    place = posixpath.normpath(name)
    return place in (".", "..") or place.startswith(("/", "../"))


# ------------------------------------------------------------------------- ids, labels, splits


def image_ids(names: Sequence[str]) -> list[str]:
    """Ids of images by their names (paths with "/"): without suffix where that is unique, else with it.

    InputError for a name that cannot be stored.
    """
    check_storable(names, key="file name")
    stems = [strip_suffix(name) for name in names]
    taken = Counter(stems)
    taken.update(name for name, stem in zip(names, stems, strict=True) if name != stem)
    return [stem if taken[stem] == 1 else name for name, stem in zip(names, stems, strict=True)]


def strip_suffix(name: str) -> str:
    """A name without the suffix of an image."""
    suffix = PurePosixPath(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in IMAGE_SUFFIXES else name


def label_classes(
    lineages: Sequence[Lineage], class_of_row: np.ndarray, levels: Sequence[str]
) -> tuple[Taxonomy, np.ndarray]:
    """Taxonomy of the lineages that rows have, and labels [N, L] of rows: `class_of_row` [N] are lineages."""
    used, of_row = np.unique(class_of_row, return_inverse=True)
    here = [lineages[i] for i in used]
    taxonomy = Taxonomy.from_lineages(here, levels)
    return taxonomy, taxonomy.encode(here)[of_row]


def split_rows(ids: Sequence[str], given: np.ndarray | None, options: ImageOptions) -> np.ndarray:
    """Split of each row: `given` [N] by the source, with the shares held out; else from the ids.

    Without `given`, shares are of all rows.
    """
    if given is None:
        if not (options.val_share or options.test_share):
            return split_of_ids(ids)
        given = np.zeros(len(ids), np.int8)
    return hold_out(ids, given, val=options.val_share, test=options.test_share)


def _empty_splits(split: np.ndarray) -> list[str]:
    return [name for number, name in enumerate(SPLITS) if not (split == number).any()]


def _tell_empty(empty: Sequence[str], console: Console) -> None:
    """Say which splits have no rows: a search needs all three."""
    if empty:
        options_that_help = " and ".join(f"--{name}-share" for name in empty if name != "train")
        hint = f"; {options_that_help} would take rows of train" if options_that_help else ""
        tell(console, f"no row is in {' or '.join(empty)}, and a search needs train, val and test{hint}")


# ------------------------------------------------------------------------------------- writing


def require_files(root: Path, names: Sequence[str], options: ImageOptions, allowed: str) -> None:
    """InputError if images are missing: said before hours of work, not after. Nothing if they are skipped."""
    if options.skip_broken:
        return
    missing = [name for name in names if not os.path.isfile(os.path.join(root, name))]
    if missing:
        problem = "there is no such image"
        if len(missing) > 1:
            problem += f"; {len(missing):,} of {len(names):,} are missing"
        raise InputError(problem, file=root / missing[0], allowed=f"{allowed}; or --skip-broken")


def file_rows(root: Path, names: Sequence[str], size: int) -> LoadRow:
    """Rows from image files: `names` are paths below `root`."""
    return lambda row: read_image(os.path.join(root, names[row]), size)


def write_images(
    out: str | Path,
    load: LoadRow,
    labels: np.ndarray,
    taxonomy: Taxonomy,
    ids: Sequence[str],
    split: np.ndarray,
    options: ImageOptions,
    console: Console,
) -> Path:
    """Write a data set of images, row `i` from `load(i)`; a few images at a time are in memory.

    Says what is left out, and which splits have no rows.
    """
    _pillow()
    empty = _empty_splits(split)
    _tell_empty(empty, console)
    shape = (len(ids), options.size, options.size, 3)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    dropped: list[int] = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("images", total=len(ids))
        blocks = _blocks(load, shape, options, dropped, lambda: progress.advance(task))
        rows = RowBlocks(shape, np.dtype(np.uint8), blocks, dropped)
        path = write_dataset(out, rows, labels, taxonomy, ids, split, overwrite=options.overwrite)
    if dropped:
        shown = ", ".join(ids[row] for row in dropped[:5]) + (", ..." if len(dropped) > 5 else "")
        tell(console, f"{len(dropped):,} of {len(ids):,} images are broken or missing, and left out: {shown}")
        if (left := _empty_splits(np.delete(split, dropped))) != empty:
            _tell_empty(left, console)
    return path


def _blocks(
    load: LoadRow,
    shape: tuple[int, ...],
    options: ImageOptions,
    dropped: list[int],
    advance: Callable[[], None],
) -> Iterator[np.ndarray]:
    block, filled = np.empty((block_rows(shape, 1), *shape[1:]), np.uint8), 0

    rows = loaded(load, range(shape[0]), skip_broken=options.skip_broken, threads=options.threads)
    for row, pixels in enumerate(rows):
        advance()
        if pixels is None:
            dropped.append(row)
            continue
        block[filled] = pixels
        filled += 1
        if filled == len(block):
            yield block
            filled = 0
    if filled:
        yield block[:filled]


def loaded(
    load: LoadRow, rows: Iterable[int], *, skip_broken: bool, threads: int | None = None
) -> Iterator[np.ndarray | None]:
    """Pixels of each of `rows`, in their order, by threads (by default one per core).

    None for a broken row where they are skipped, else its InputError.
    """

    def load_or_skip(row: int) -> np.ndarray | None:
        try:
            return load(row)
        except InputError:
            if skip_broken:
                return None
            raise

    return _in_threads(load_or_skip, rows, threads or _cores())


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_threads(function: Callable[[int], Any], rows: Iterable[int], threads: int) -> Iterator[Any]:
    """Results of `function` in the order of `rows`; so many are made ahead that no thread waits, not more."""
    ahead: deque[Future] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for row in rows:
                ahead.append(pool.submit(function, row))
                if len(ahead) > 8 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
