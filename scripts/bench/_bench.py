"""Shared by the benchmarks: paired timing, and figures as a table and as one line of JSON.

This machine's speed drifts by more than most effects, so nothing is timed alone: the two sides of
a ratio alternate within one process, and the figure is the median of the ratios of single rounds.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """One measured number and what it should be."""

    name: str
    value: float
    target: float | None = None
    """None: reported, without a target."""
    better: Literal["below", "above"] = "below"
    unit: str = "x"
    """`x` is a ratio."""

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value <= self.target if self.better == "below" else self.value >= self.target


def seconds(run: Callable[[], object], repeat: int = 1) -> float:
    """Wall seconds of one call of `run`, averaged over `repeat` calls in a row."""
    start = time.perf_counter()
    for _ in range(repeat):
        run()
    return (time.perf_counter() - start) / repeat


def ratio(
    ours: Callable[[], object],
    baseline: Callable[[], object],
    *,
    rounds: int,
    warmup: int = 2,
    round_seconds: float = 0.02,
) -> float:
    """Median over `rounds` of (time of `ours` / time of `baseline`), interleaved.

    Each side of a round runs often enough to take about `round_seconds`; the side that goes first
    alternates.
    """
    for _ in range(warmup):
        ours()
        baseline()
    repeat = max(1, round(round_seconds / max(seconds(baseline), 1e-6)))
    ratios = []
    for number in range(rounds):
        if number % 2:
            of_baseline = seconds(baseline, repeat)
            of_ours = seconds(ours, repeat)
        else:
            of_ours = seconds(ours, repeat)
            of_baseline = seconds(baseline, repeat)
        ratios.append(of_ours / of_baseline)
    return statistics.median(ratios)


def show(title: str, figures: Sequence[Figure]) -> None:
    """Print a table, then one JSON object as the last line: `{"figures": {...}, "targets": {...}}`."""
    table = Table(title=title, title_justify="left")
    table.add_column("figure")
    for column in ("measured", "target", "met"):
        table.add_column(column, justify="right")
    for figure in figures:
        target = (
            "" if figure.target is None else f"{_SIGN[figure.better]} {_number(figure.target, figure.unit)}"
        )
        met = {None: "", True: "yes", False: "NO"}[figure.met]
        table.add_row(figure.name, _number(figure.value, figure.unit), target, met)
    Console(width=120).print(table)
    content = {
        "figures": {figure.name: figure.value for figure in figures},
        "targets": {
            figure.name: {"target": figure.target, "better": figure.better, "unit": figure.unit}
            for figure in figures
            if figure.target is not None
        },
    }
    print(json.dumps(content), flush=True)


_SIGN = {"below": "<=", "above": ">="}


def _number(value: float, unit: str) -> str:
    return f"{value:.3g} {unit}"
