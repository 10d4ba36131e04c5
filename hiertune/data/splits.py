"""Which rows train, validate and test, decided by each row's id alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

SPLITS = ("train", "val", "test")
"""Names of the splits; a split's number is its place here."""

TRAIN_BELOW, VAL_BELOW = 0.6, 0.7


def split_of_ids(ids: Iterable[str]) -> np.ndarray:
    """Split of each id, int8 [N]: 0 train, 1 val, 2 test.

    The first eight hex digits of sha256(id), as a share of 2**32, below 0.6 are train, below 0.7
    validation, else test: a row keeps its split whatever rows come or go around it.
    """
    share = _shares(ids)
    return ((share >= TRAIN_BELOW).astype(np.int8) + (share >= VAL_BELOW)).astype(np.int8)


def hold_out(ids: Iterable[str], split: np.ndarray, *, val: float = 0.0, test: float = 0.0) -> np.ndarray:
    """`split` [N] with these shares of its training rows moved to validation and test, by their ids.

    Of the training rows, those whose share of 2**32 (see `split_of_ids`) is below `test` become test, of
    the others those below `test + val` validation. All other rows stay.
    """
    share, train = _shares(ids), np.asarray(split) == SPLITS.index("train")
    moved = np.where(train & (share < test + val), SPLITS.index("val"), split)
    return np.where(train & (share < test), SPLITS.index("test"), moved).astype(np.int8)


def _shares(ids: Iterable[str]) -> np.ndarray:
    """First eight hex digits of sha256 of each id, as a share of 2**32, in [0, 1)."""
    heads = b"".join(hashlib.sha256(name.encode()).digest()[:4] for name in ids)
    return np.frombuffer(heads, ">u4") / 2**32
