from __future__ import annotations

import hashlib

import numpy as np

from hiertune.data import SPLITS, split_of_ids
from hiertune.data.splits import hold_out


def naive_split(name: str) -> int:
    share = int(hashlib.sha256(name.encode("utf-8")).hexdigest()[:8], 16) / 2**32
    return 0 if share < 0.6 else 1 if share < 0.7 else 2


def test_split_is_that_of_the_hash():
    ids = [f"id-{i}" for i in range(2000)] + ["", "ä", "日本"]
    split = split_of_ids(ids)
    assert split.dtype == np.int8
    assert split.tolist() == [naive_split(name) for name in ids]
    assert set(split.tolist()) == {0, 1, 2}


def test_known_ids():
    # sha256: "a" ca978112.. = 0.791, "b" 3e23e816.. = 0.243, "2" d4735e3a.. = 0.830, "7" 7902699b.. = 0.473
    assert [SPLITS[s] for s in split_of_ids(["a", "b", "2", "7"])] == ["test", "train", "test", "train"]


def test_hold_out_takes_training_rows_by_their_hash():
    ids = ["a", "b", "2", "7", "b", "b"]  # shares 0.791, 0.243, 0.830, 0.473
    split = np.array([0, 0, 0, 0, 1, 2], np.int8)
    found = hold_out(ids, split, val=0.3, test=0.25)
    assert found.dtype == np.int8
    assert [SPLITS[s] for s in found] == ["train", "test", "train", "val", "val", "test"]
    assert hold_out(ids, split, val=0.25).tolist() == [0, 1, 0, 0, 1, 2]
    assert hold_out(ids, split).tolist() == split.tolist()
    assert split.tolist() == [0, 0, 0, 0, 1, 2]


def test_no_ids():
    assert split_of_ids([]).shape == (0,)


def test_a_row_keeps_its_split_whatever_is_around_it():
    assert split_of_ids(["p", "q", "r"])[[2, 0]].tolist() == split_of_ids(["r", "p"]).tolist()
