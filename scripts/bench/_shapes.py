"""Small generated images over a taxonomy: family of shape -> shape -> colour of the shape.

Only shape and colour tell: place, size, turn, background, light and noise are random, and the mean colour
of every image is the same. Shared by the image benchmark and the tests.
"""

from __future__ import annotations

import numpy as np
import torch

from hiertune import Taxonomy
from hiertune.data import HierarchicalDataset, MemoryInputs

LEVELS = ("family", "shape", "colour")

_COLOURS = {"red": (1.0, 0.15, 0.15), "green": (0.1, 0.8, 0.2), "blue": (0.2, 0.3, 1.0)}
_EDGE = 0.06  # width of a shape's soft edge, of its radius


def shape_images(rows: int, size: int = 32, seed: int = 0) -> HierarchicalDataset:
    """`rows` uint8 images [rows, size, size, 3], split 70 : 15 : 15; the classes come equally often."""
    random = np.random.default_rng(seed)
    leaves = [
        (family, shape, f"{colour} {shape}")
        for family, shapes in _FAMILIES.items()
        for shape in shapes
        for colour in _COLOURS
    ]
    taxonomy = Taxonomy.from_lineages(leaves, LEVELS)
    lineages = [leaves[row % len(leaves)] for row in range(rows)]
    images = np.stack(
        [_image(family, shape, name.split()[0], size, random) for family, shape, name in lineages]
    )
    order = random.permutation(rows)
    split = random.permutation(np.repeat([0, 1, 2], [rows - 2 * (rows * 15 // 100), *[rows * 15 // 100] * 2]))
    return HierarchicalDataset(
        MemoryInputs(torch.from_numpy(images[order])),
        taxonomy.encode(lineages)[order],
        np.array([f"image{row}" for row in range(rows)], object),
        split.astype(np.int8),
        taxonomy,
        "generated shapes",
    )


def _image(family: str, shape: str, colour: str, size: int, random: np.random.Generator) -> np.ndarray:
    radius = random.uniform(0.22, 0.38) * size
    center = random.uniform(radius, size - radius, 2)
    turn = random.uniform(-0.3, 0.3)
    y, x = (np.mgrid[:size, :size] - center[:, None, None] + 0.5) / radius
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    inside = np.clip(0.5 - _FAMILIES[family][shape](u, v) / _EDGE / 2, 0, 1)[..., None]
    slope = random.normal(0, 0.15, (2, 3))
    background = random.uniform(0.25, 0.75, 3) + slope[0] * x[..., None] / 3 + slope[1] * y[..., None] / 3
    background = background + random.normal(0, 0.06, (size, size, 3))
    light = random.uniform(0.75, 1.0)
    image = inside * light * np.array(_COLOURS[colour]) + (1 - inside) * background
    # the background makes up for the shape's colour, so that the mean of an image says nothing
    image += (1 - inside) * (0.5 - image.mean((0, 1))) / (1 - inside).mean()
    return np.clip(255 * image + random.normal(0, 4, image.shape), 0, 255).astype(np.uint8)


def _disk(u, v):
    return np.hypot(u, v) - 0.9


def _ring(u, v):
    return np.abs(np.hypot(u, v) - 0.7) - 0.25


def _crescent(u, v):
    return np.maximum(_disk(u, v), 0.75 - np.hypot(u - 0.45, v))


def _box(u, v, width=0.75, height=0.75):
    return np.maximum(np.abs(u) - width, np.abs(v) - height)


def _triangle(u, v):
    return np.maximum(np.abs(u) * 1.7 + v * 0.9 - 0.75, -v - 0.8) / 1.4


def _frame(u, v):
    return np.maximum(_box(u, v, 0.85, 0.85), -_box(u, v, 0.45, 0.45))


def _plus(u, v):
    return np.minimum(_box(u, v, 0.95, 0.25), _box(u, v, 0.25, 0.95))


def _letter_t(u, v):
    return np.minimum(_box(u, v + 0.65, 0.9, 0.25), _box(u, v, 0.25, 0.9))


def _letter_l(u, v):
    return np.minimum(_box(u + 0.6, v, 0.25, 0.9), _box(u, v - 0.65, 0.85, 0.25))


_FAMILIES = {
    "round": {"disk": _disk, "ring": _ring, "crescent": _crescent},
    "cornered": {"square": _box, "triangle": _triangle, "frame": _frame},
    "crossed": {"plus": _plus, "tee": _letter_t, "ell": _letter_l},
}
"""Signed distance from the edge of each shape, negative inside, in its own frame (-1 to 1)."""
