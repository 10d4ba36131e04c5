from __future__ import annotations

import io
import os
import sys
import threading

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from hiertune import Taxonomy
from hiertune.data import ImageOptions, split_of_ids
from hiertune.data.importers.notes import known_rows, quiet
from hiertune.data.importers.pixels import (
    _in_threads,
    find_images,
    fit_array,
    fit_image,
    image_ids,
    leads_outside,
    read_image,
    split_rows,
    write_images,
)
from hiertune.errors import InputError


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".ppm", ".webp"])
def test_an_image_of_the_size_keeps_its_pixels(tmp_path, image, suffix):
    options = {"lossless": True} if suffix == ".webp" else {}
    pixels = image(tmp_path / f"a{suffix}", size=16, **options)
    assert np.array_equal(read_image(tmp_path / f"a{suffix}", 16), pixels)


@pytest.mark.parametrize(("width", "height"), [(40, 10), (10, 40), (41, 10)])
def test_the_centre_is_cut(tmp_path, width, height):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[height // 2 - 5 : height // 2 + 5, width // 2 - 5 : width // 2 + 5] = 255  # the middle 10 x 10
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png", 10)
    assert found.shape == (10, 10, 3)
    assert (found[1:-1, 1:-1] == 255).all()
    assert width % 2 or (found == 255).all()


def test_resizing_is_antialiased(tmp_path):
    """A checkerboard of single pixels is grey when it shrinks; picking pixels would make it all black."""
    board = np.indices((64, 96)).sum(axis=0) % 2 * 255
    Image.fromarray(board.astype(np.uint8)).save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png", 16)
    assert found.shape == (16, 16, 3)
    assert np.abs(found.astype(int) - 127.5).max() < 4


def test_a_small_image_grows(tmp_path, image):
    image(tmp_path / "a.png", size=4)
    assert read_image(tmp_path / "a.png", 12).shape == (12, 12, 3)


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [(1, lambda a: a), (3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)),
     (8, lambda a: np.rot90(a)), (2, lambda a: a[:, ::-1])],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_exif_orientation(tmp_path, image, orientation, turned, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = image(tmp_path / f"a{suffix}", exif=exif)
    assert np.array_equal(read_image(tmp_path / f"a{suffix}", 8), turned(pixels))


def test_modes_become_rgb(tmp_path):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (8, 8), np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(read_image(tmp_path / "grey.png", 8), np.repeat(grey[..., None], 3, axis=2))

    rgba = rng.integers(0, 256, (8, 8, 4), np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    assert np.array_equal(read_image(tmp_path / "rgba.png", 8), rgba[..., :3])

    palette = Image.fromarray(grey).convert("P")
    palette.putpalette(rng.integers(0, 256, 768, np.uint8).tobytes())
    palette.save(tmp_path / "palette.png")
    assert np.array_equal(read_image(tmp_path / "palette.png", 8), np.asarray(palette.convert("RGB")))

    deep = rng.integers(0, 65536, (8, 8), np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(read_image(tmp_path / "deep.png", 8)[..., 0], deep // 256)


def test_a_large_jpeg_decoded_at_less_is_nearly_the_same(tmp_path):
    """Decoding at a half or less must not be seen: compare with decoding all of it."""
    x, y = np.meshgrid(np.linspace(0, 6, 1024), np.linspace(0, 4, 768))
    waves = np.stack([np.sin(x * y), np.cos(3 * x), np.sin(x + 2 * y)], axis=2)
    picture = Image.fromarray(((waves + 1) * 127).astype(np.uint8))
    picture.save(tmp_path / "a.jpg", quality=95)
    picture.save(tmp_path / "a.png")
    found, exact = (read_image(tmp_path / name, 64).astype(int) for name in ("a.jpg", "a.png"))
    assert np.abs(found - exact).max() <= 8


def test_a_jpeg_of_less_than_four_times_the_size_is_decoded_in_full(tmp_path, image):
    image(tmp_path / "a.jpg", size=95)
    with Image.open(tmp_path / "a.jpg") as opened:
        assert np.array_equal(read_image(tmp_path / "a.jpg", 24), fit_image(opened, 24))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("a.png", lambda b: b[: len(b) // 2]),
        ("a.jpg", lambda b: b[: len(b) // 2]),
        ("a.png", lambda b: b[:40] + b"\0\0\0\0" + b[44:]),
        ("a.jpg", lambda b: b""),
        ("a.jpg", lambda b: b"<html>not found</html>"),
    ],
)
def test_a_broken_image_is_named(tmp_path, image, message, name, damage):
    path = tmp_path / name
    image(path, size=64)
    path.write_bytes(damage(path.read_bytes()))
    assert message(read_image, path, 16).startswith(f"{path}: cannot be read as an image: ")


def test_other_images_that_cannot_be_read(tmp_path, message):
    assert message(read_image, tmp_path / "no.jpg", 16) == f"{tmp_path / 'no.jpg'}: there is no such image"
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "float.tiff")
    assert "its pixels have no fixed range (mode F)" in message(read_image, tmp_path / "float.tiff", 8)


def test_arrays_are_fitted_as_files_are(tmp_path, image):
    pixels = image(tmp_path / "a.png", size=20)
    assert fit_array(pixels, 20) is pixels
    assert np.array_equal(fit_array(pixels, 8), read_image(tmp_path / "a.png", 8))


def test_pillow_is_asked_for_by_name(tmp_path, monkeypatch, message):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    found = message(read_image, tmp_path / "a.png", 8)
    assert "Pillow, which is not installed" in found
    assert "pip install 'hiertune[vision]'" in found


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (["a/1.jpg", "b/1.JPG"], ["a/1", "b/1"]),
        (["a/1.jpg", "a/1.png", "a/2.png"], ["a/1.jpg", "a/1.png", "a/2"]),
        (["1.jpg", "1.png", "1.jpg.png"], ["1.jpg", "1.png", "1.jpg.png"]),
        (["plain", "v1.5", "v1.6", "x.y.jpeg"], ["plain", "v1.5", "v1.6", "x.y"]),
        (["a", "a.jpg"], ["a", "a.jpg"]),
    ],
)
def test_ids(names, ids):
    assert image_ids(names) == ids


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"size": 0}, "size: is 0"),
        ({"size": 4097}, "size: is 4097"),
        ({"threads": 0}, "threads: is 0"),
        ({"val_share": 1.0}, "val_share: is 1.0"),
        ({"test_share": -0.1}, "test_share: is -0.1"),
        ({"val_share": 0.5, "test_share": 0.5}, "val_share, test_share: together they are 1.0"),
    ],
)
def test_options_are_checked(message, options, expected):
    assert message(ImageOptions, **options).splitlines()[0] == expected


def test_splits():
    ids = [f"row{i}" for i in range(4000)]
    assert np.array_equal(split_rows(ids, None, ImageOptions()), split_of_ids(ids))

    shares = ImageOptions(val_share=0.1, test_share=0.2)
    all_rows = split_rows(ids, None, shares)
    assert np.bincount(all_rows) / 4000 == pytest.approx([0.7, 0.1, 0.2], abs=0.02)

    given = np.repeat(np.array([0, 1], np.int8), 2000)
    assert split_rows(ids, given, ImageOptions()).tolist() == given.tolist()
    held_out = split_rows(ids, given, ImageOptions(test_share=0.2))
    assert (held_out[2000:] == 1).all(), "the source's validation rows stay"
    assert np.array_equal(held_out[:2000] == 2, all_rows[:2000] == 2), "which rows follows from the ids alone"
    assert not (held_out[:2000] == 1).any()


@pytest.mark.parametrize(
    ("name", "outside"),
    [
        ("a.png", False),
        ("a/../b.png", False),
        ("..a/b.png", False),
        ("./a.png", False),
        ("../a.png", True),
        ("a/../../b.png", True),
        ("/a.png", True),
        ("//a.png", True),
        ("..", True),
        (".", True),
        ("", True),
        ("a/..", True),
    ],
)
def test_names_that_lead_outside(name, outside):
    assert leads_outside(name) == outside


def test_what_is_in_a_folder(tmp_path, image):
    for name in ("b/1.PNG", "a.jpg", "b/c/2.webp", ".hidden/3.png", "b/.4.png", "b/5.txt"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    os.mkfifo(tmp_path / "images/pipe.jpg")
    (tmp_path / "images/gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "images/self").symlink_to(tmp_path / "images/self")
    (tmp_path / "images/file.png").symlink_to(tmp_path / "images/a.jpg")
    found = find_images(tmp_path / "images")
    assert found.images == ["a.jpg", "b/1.PNG", "b/c/2.webp", "file.png", "gone.jpg"]
    assert sorted(found.others) == ["b/5.txt", "pipe.jpg", "self"]
    assert found.repeated == []


def test_a_folder_that_cannot_be_read(tmp_path, message, monkeypatch):
    def scandir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", scandir)  # root may read everything
    assert message(find_images, tmp_path) == f"{tmp_path}: cannot be read (Permission denied)"


def test_pipes_are_not_waited_for(tmp_path, message):
    os.mkfifo(tmp_path / "a.jpg")
    assert message(read_image, tmp_path / "a.jpg", 8) == f"{tmp_path / 'a.jpg'}: is no regular file"


def test_known_rows():
    console = Console(file=io.StringIO(), width=300)
    assert known_rows(np.array([[-1, 0], [-1, -1], [2, -1], [-1, -1]]), console).tolist() == [0, 2]
    assert console.file.getvalue() == "note: 2 of 4 rows are unknown at all levels, and left out\n"
    assert known_rows(np.array([[0], [1]]), console).tolist() == [0, 1]
    assert console.file.getvalue().count("note") == 1


# ------------------------------------------------------------------------------------- writing

TAXONOMY = Taxonomy.from_lineages([("a",), ("b",)], ["top"])


def write(out, load, rows, *, console=None, split=None, **options):
    options = ImageOptions(size=8, **options)
    labels, ids = np.arange(rows)[:, None] % 2, [f"row{i}" for i in range(rows)]
    split = (np.arange(rows) % 3 if split is None else np.array(split)).astype(np.int8)
    return write_images(out, load, labels, TAXONOMY, ids, split, options, console or quiet())


def picture(row):
    return np.full((8, 8, 3), row % 251, np.uint8)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [1, 2730, 5461])  # 2730 rows are a block
def test_rows_keep_their_order_whatever_the_threads(tmp_path, open_images, rows, threads):
    write(tmp_path / "a.h5", picture, rows, threads=threads)
    data, pixels = open_images(tmp_path / "a.h5")
    assert pixels.shape == (rows, 8, 8, 3)
    assert (pixels == (np.arange(rows) % 251)[:, None, None, None]).all()
    assert data.labels[:, 0].tolist() == (np.arange(rows) % 2).tolist()


def test_threads_work_at_once_and_not_far_ahead():
    meet = threading.Barrier(2, timeout=30)
    taken = []

    def rows():
        for row in range(1000):
            taken.append(row)
            yield row

    def load(row):
        if row < 2:
            meet.wait()  # passes only while two threads are in here
        if row == 500:
            raise InputError("broken")
        return row

    results = _in_threads(load, rows(), 2)
    for row in range(500):
        assert next(results) == row
        assert len(taken) <= row + 20
    with pytest.raises(InputError, match="broken"):
        next(results)
    assert len(taken) < 520


def test_a_broken_row_ends_it_and_leaves_nothing(tmp_path):
    def load(row):
        if row == 500:
            raise InputError("broken")
        return picture(row)

    with pytest.raises(InputError, match="broken"):
        write(tmp_path / "a.h5", load, 1000, threads=2)
    assert list(tmp_path.iterdir()) == []


def test_broken_rows_are_left_out(tmp_path, open_images):
    def load(row):
        if row in (0, 3, 4000, 5999):
            raise InputError("broken")
        return picture(row)

    console = Console(file=io.StringIO(), width=300)
    write(tmp_path / "a.h5", load, 6000, skip_broken=True, console=console)
    data, pixels = open_images(tmp_path / "a.h5")
    kept = np.delete(np.arange(6000), [0, 3, 4000, 5999])
    assert data.ids.tolist() == [f"row{i}" for i in kept]
    assert data.labels[:, 0].tolist() == (kept % 2).tolist()
    assert data.split.tolist() == (kept % 3).tolist()
    assert np.array_equal(pixels[:, 0, 0, 0], kept % 251)
    told = "4 of 6,000 images are broken or missing, and left out: row0, row3, row4000, row5999"
    assert told in console.file.getvalue()


@pytest.mark.parametrize(
    ("split", "broken", "expected"),
    [
        ([0, 1, 2, 2], [], []),
        ([0, 1, 2, 2], [3], []),
        ([0, 1, 2, 2], [2, 3], ["test"]),
        ([0, 1, 1, 1], [1], ["test"]),
        ([0, 1, 0, 0], [1], ["test", "val or test"]),
        ([1, 1, 1, 1], [], ["train or test"]),
    ],
)
def test_splits_without_rows_are_told(tmp_path, split, broken, expected):
    """Before the work, and again if what is left out makes another difference."""

    def load(row):
        if row in broken:
            raise InputError("broken")
        return picture(row)

    console = Console(file=io.StringIO(), width=300)
    write(tmp_path / "a.h5", load, 4, split=split, skip_broken=True, console=console)
    told = [line for line in console.file.getvalue().splitlines() if "no row is in" in line]
    hints = [
        " and ".join(f"--{name}-share" for name in names.split(" or ") if name != "train")
        for names in expected
    ]
    assert told == [
        f"note: no row is in {names}, and a search needs train, val and test; {hint} would take rows of train"
        for names, hint in zip(expected, hints, strict=True)
    ]


def test_nothing_is_written_where_all_is_broken(tmp_path, message):
    def load(row):
        raise InputError("broken")

    assert "no row is left" in message(write, tmp_path / "a.h5", load, 5, skip_broken=True)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_exists_is_refused_before_the_work(tmp_path, message):
    (tmp_path / "a.h5").write_text("precious")
    calls = []
    assert "exists already" in message(write, tmp_path / "a.h5", calls.append, 5)
    assert calls == []
    write(tmp_path / "a.h5", picture, 5, overwrite=True)
