"""What importers say of the data that they leave out."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.markup import escape

from hiertune._text import visible


def tell(console: Console, text: str) -> None:
    """One line about what was done with the data."""
    console.print(f"[yellow]note:[/] {escape(visible(text))}", highlight=False, soft_wrap=True)


def quiet() -> Console:
    """A console that shows nothing."""
    return Console(quiet=True)


def known_rows(labels: np.ndarray, console: Console) -> np.ndarray:
    """Sorted int64 indices of the rows of `labels` [N, L] that are known at any level; says how many are not.

    Rows without any label are of no use to training, and would count as test rows.
    """
    kept = np.flatnonzero((labels >= 0).any(axis=1))
    if len(kept) < len(labels):
        missing = len(labels) - len(kept)
        tell(console, f"{missing:,} of {len(labels):,} rows are unknown at all levels, and left out")
    return kept
