"""What MLflow takes: names, lengths, and how much in one request."""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

MOST_METRICS, MOST_VALUES, MOST_BYTES = 1000, 100, 900_000  # per request; MLflow's own is a million bytes
LONGEST_KEY, LONGEST_PARAM, LONGEST_TAG = 250, 6000, 8000

Item = TypeVar("Item")


def clean_name(name: str) -> str:
    """`name` as MLflow takes it: letters, digits and `_-. /`, no empty or dot segments, 250 characters.

    A changed name ends in a hash of the given one, so two names never become one.
    """
    parts = re.sub(r"[^/\w.\- ]", "_", name).split("/")
    clean = "/".join("_" if part in ("", ".", "..") else part for part in parts)
    if clean.startswith(".."):  # to MLflow that is a way out of its folder, whatever follows
        clean = f"_{clean}"
    if clean == name and len(name) <= LONGEST_KEY and posixpath.normpath(name) == name:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{clean[: LONGEST_KEY - 9]}_{digest}"


def text(value: Any, longest: int) -> str:
    """A value as in YAML, cut visibly where MLflow would refuse it."""
    whole = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return whole if len(whole) <= longest else whole[: longest - 1] + "…"


def batches(items: Iterable[Item], most: int, size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """`items` in order, in lists of at most `most` and MOST_BYTES."""
    batch: list[Item] = []
    room = MOST_BYTES
    for item in items:
        if batch and (len(batch) == most or size(item) > room):
            yield batch
            batch, room = [], MOST_BYTES
        batch.append(item)
        room -= size(item)
    if batch:
        yield batch


def json_size(item: Any) -> int:
    """Bytes of a parameter or tag in a request, at most."""
    return len(json.dumps([item.key, item.value])) + 30
