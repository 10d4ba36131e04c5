"""Data sets that come with hiertune; features are computed on first use and cached."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import platformdirs

from hiertune.config import KmerConfig
from hiertune.data.format import VERSION
from hiertune.data.importers.fasta import import_fasta
from hiertune.errors import InputError

_FOLDER = Path(__file__).parent / "builtin"

_LEVELS = {"rrna16s": ("domain", "phylum", "class", "order", "family", "genus")}
"""Levels of each data set; its sequences are `builtin/NAME.fasta.gz`."""


def builtin_names() -> list[str]:
    return sorted(_LEVELS)


def cache_folder() -> Path:
    """Where features are kept: HIERTUNE_CACHE, or this user's cache folder."""
    given = os.environ.get("HIERTUNE_CACHE")
    return Path(given).expanduser() if given else platformdirs.user_cache_path("hiertune", appauthor=False)


def builtin_path(name: str, kmer: KmerConfig) -> Path:
    """The HDF5 file of a built-in data set, made now if it is not in the cache.

    Processes that do so at once each write a file of their own, and the last one stays: all are equal.
    """
    if name not in _LEVELS:
        allowed = ", ".join(f"builtin:{known}" for known in builtin_names())
        raise InputError(f"there is no built-in data set {name!r}", key="data.path", allowed=allowed)
    source = _FOLDER / f"{name}.fasta.gz"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    path = cache_folder() / f"{name}-{digest}-k{kmer.k}-{kmer.transform}-v{VERSION}.h5"
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        allowed = "a cache folder that can be written: set HIERTUNE_CACHE to one"
        raise InputError(f"cannot be made: {error}", file=path.parent, allowed=allowed) from error
    return import_fasta(source, path, _LEVELS[name], k=kmer.k, transform=kmer.transform, overwrite=True)
