"""Sequences to features: how often each word of k letters occurs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hiertune.config import KmerConfig
from hiertune.errors import InputError

_OTHER = 4  # code of every letter that is not A, C, G, T or U


def _letter_codes() -> np.ndarray:
    codes = np.full(256, _OTHER, np.int32)
    for code, letters in enumerate(("Aa", "Cc", "Gg", "TtUu")):
        for letter in letters:
            codes[ord(letter)] = code
    return codes


_CODES = _letter_codes()


def count_kmers(sequence: bytes, k: int) -> np.ndarray:
    """Counts of all words of `k` letters, int64 [4**k], words in the order AA..A, AA..C, ... TT..T.

    U counts as T and lower case as upper; words with any other letter in them are left out.
    """
    letters = _CODES[np.frombuffer(sequence, np.uint8)]
    n_words = max(len(letters) - k + 1, 0)
    words = np.zeros(n_words, np.int32)
    broken = np.zeros(n_words, bool)
    for i in range(k):
        letter = letters[i : i + n_words]
        words = (words << 2) + letter  # an _OTHER spoils the word, but then it is broken
        broken |= letter == _OTHER
    return np.bincount(words[~broken], minlength=4**k)


def _frequency(counts: np.ndarray) -> np.ndarray:
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


TRANSFORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "counts": lambda counts: counts,
    "frequency": _frequency,
    "sqrt": lambda counts: np.sqrt(_frequency(counts)),
    "presence": lambda counts: counts > 0,
}
"""From counts [n, 4**k] to features of the same shape; each row by itself."""


def kmer_config(k: int, transform: str) -> KmerConfig:
    """Raises InputError for an unknown transform or a `k` outside 1..8."""
    if transform not in TRANSFORMS:
        raise InputError(f"there is no k-mer transform {transform!r}", allowed=", ".join(TRANSFORMS))
    if not 1 <= k <= 8:
        raise InputError(f"k-mers cannot be {k} letters long", allowed="1 to 8")
    return KmerConfig.model_validate({"k": k, "transform": transform})


def kmer_features(sequences: Sequence[bytes], k: int, transform: str) -> np.ndarray:
    """Features float32 [n, 4**k] of `n` sequences; a sequence without any whole word gives zeros.

    Raises InputError for an unknown transform or a `k` outside 1..8.
    """
    kmer_config(k, transform)
    counts = np.empty((len(sequences), 4**k), np.int64)
    for row, sequence in enumerate(sequences):
        counts[row] = count_kmers(sequence, k)
    return TRANSFORMS[transform](counts).astype(np.float32)
