"""The report's figures, as the plain data that plotly.js draws.

Texts from data are escaped: plotly.js reads some HTML in labels.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from hiertune.report.read import PARAM, Search

# State is told by shape as well as by colour. These colours are clear on white and on near-black.
STATES = {
    "completed": ("#4285d6", "circle"),
    "pruned": ("#d9922b", "triangle-down"),
    "failed": ("#d64545", "x"),
    "interrupted": ("#8a8f98", "square"),
    "outside": ("#8a8f98", "x-thin-open"),
    "running": ("#8a8f98", "circle-open"),
}
WINNER, QUIET = "#1f9d61", "#8a8f98"
CONTENDERS = (WINNER, "#4285d6", "#d9922b", "#9b6bd3", "#8a8f98")
MOST_CURVES, MOST_BARS, MOST_SLICES = 100, 12, 6


Trace = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    title: str
    caption: str
    content: dict[str, Any]
    """`data` and `layout` for Plotly.newPlot."""


def _figure(
    traces: list[Trace], title: str, caption: str, layout: dict[str, Any], height: int = 320
) -> Figure:
    common = {
        "height": height,
        "margin": {"l": 56, "r": 16, "t": 12, "b": 44 if "title" in layout["xaxis"] else 26},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        "hovermode": "closest",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
    }
    return Figure(title, caption, {"data": traces, "layout": common | layout})


def history(search: Search) -> Figure | None:
    """Objective by trial, and the best so far."""
    trials = search.trials[search.trials["objective"].notna()]
    if trials.empty:
        return None
    traces = [
        points | {"x": part["trial"].tolist(), "name": state, "hovertemplate": "trial %{x}: %{y:.4f}"}
        for state, part, points in _by_state(trials)
    ]
    completed = trials[trials["state"] == "completed"]
    best = completed["objective"].cummax() if search.mode == "max" else completed["objective"].cummin()
    so_far = {
        "type": "scatter",
        "mode": "lines",
        "name": "best so far",
        "x": completed["trial"].tolist(),
        "y": best.tolist(),
        "line": {"shape": "hv", "color": WINNER, "width": 2},
        "hoverinfo": "skip",
    }
    caption = "Each point is a trial's last value; a trial stopped early could not show its best."
    axes = {"xaxis": _whole("trial", len(search.trials)), "yaxis": _named(search.metric)}
    return _figure([*traces, so_far], "How the search went", caption, axes)


def learning_curves(search: Search) -> Figure | None:
    """The objective metric by epoch, the winner in front."""
    if search.curves.empty:
        return None
    best = search.best
    by_rank = list(dict.fromkeys([*search.ranked["trial"], *search.trials["trial"]]))
    shown = set(by_rank[:MOST_CURVES])
    traces = [
        _curve(curve, f"trial {trial:.0f}", QUIET, 1, 0.45)
        for trial, curve in search.curves.groupby("trial")
        if trial in shown and trial != best
    ]
    of_best = search.curves[search.curves["trial"] == best]
    if not of_best.empty:
        traces.append(_curve(of_best, f"trial {best}, the best", WINNER, 3, 1.0))
    left_out = search.curves["trial"].nunique() - len(traces)
    caption = f"The best {MOST_CURVES} trials; {left_out} others are left out." if left_out else ""
    axes = {"xaxis": _whole("epoch", search.curves["epoch"].max()), "yaxis": _named(search.metric)}
    return _figure(traces, "Learning curves", caption, axes | {"showlegend": False})


def _curve(curve: pd.DataFrame, name: str, colour: str, width: int, opacity: float) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers" if len(curve) == 1 else "lines",
        "name": name,
        "x": curve["epoch"].tolist(),
        "y": curve["value"].tolist(),
        "line": {"color": colour, "width": width},
        "marker": {"color": colour},
        "opacity": opacity,
        "hovertemplate": "epoch %{x}: %{y:.4f}",
    }


def importance(search: Search) -> Figure | None:
    """What decided: each parameter's share."""
    shares = list(search.importance.items())[:MOST_BARS][::-1]
    if not shares:
        return None
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": [share for _, share in shares],
        "y": [_text(name) for name, _ in shares],
        "text": [f"{share:.0%}" for _, share in shares],
        "textposition": "outside",
        "cliponaxis": False,
        "marker": {"color": STATES["completed"][0]},
        "hoverinfo": "skip",
    }
    caption = "Share of each setting in what tells good completed trials from the others (PED-ANOVA)."
    layout = {
        "xaxis": {"visible": False, "range": [0, 1.15 * shares[-1][1]]},
        "yaxis": {"automargin": True, "showgrid": False},
    }
    return _figure([bars], "Which settings mattered", caption, layout, height=60 + 28 * len(shares))


def slices(search: Search) -> list[Figure]:
    """The objective against each of the most important parameters."""
    trials = search.trials[search.trials["objective"].notna()]
    names = [name for name in search.importance if PARAM + name in trials]
    names += [name for name in search.params if name not in names]
    varied = [name for name in names if trials[PARAM + name].dropna().astype(str).nunique() > 1]
    return [_slice(trials, name) for name in varied[:MOST_SLICES]]


def _slice(trials: pd.DataFrame, name: str) -> Figure:
    given = trials[trials[PARAM + name].notna()]
    values = given[PARAM + name]
    numeric = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
    traces = []
    for _, part, points in _by_state(given):
        x = part[PARAM + name].tolist()
        labels = x if numeric else [_text(str(value)) for value in x]
        hover = "trial %{customdata}: %{x}, %{y:.4f}"
        traces.append(points | {"x": labels, "customdata": part["trial"].tolist(), "hovertemplate": hover})
    axis: dict[str, Any] = {"type": "category"}
    if numeric:
        over_decades = values.min() > 0 and values.max() > 100 * values.min()
        axis = {"type": "log", "exponentformat": "e", "dtick": 1} if over_decades else {"type": "linear"}
    return _figure(traces, name, "", {"xaxis": axis, "showlegend": False}, height=220)


def _by_state(trials: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame, Trace]]:
    """Trials of each state that occurs, and their markers with the objective as y."""
    for state, (colour, symbol) in STATES.items():
        part = trials[trials["state"] == state]
        if not part.empty:
            marker = {"color": colour, "symbol": symbol, "size": 8, "opacity": 0.85}
            y = part["objective"].tolist()
            yield state, part, {"type": "scatter", "mode": "markers", "marker": marker, "y": y}


def level_bars(contenders: Mapping[str, Mapping[str, float]], split: str) -> Figure | None:
    """Share of wrong rows per level (bars of accuracy would all look alike), one bar per contender."""
    prefix = f"{split}/accuracy/"
    first = next(iter(contenders.values()), {})
    levels = [name.removeprefix(prefix) for name in first if name.startswith(prefix)]
    if not levels:
        return None
    traces = []
    for colour, (label, metrics) in zip(CONTENDERS, contenders.items(), strict=False):
        wrong = [1 - metrics[prefix + level] if prefix + level in metrics else None for level in levels]
        traces.append(
            {
                "type": "bar",
                "name": _text(label),
                "x": [_text(level) for level in levels],
                "y": wrong,
                "text": [None if share is None else f"{100 * share:.1f}" for share in wrong],
                "textposition": "outside",
                "cliponaxis": False,
                "marker": {"color": colour},
                "hovertemplate": "%{x}: %{y:.2%} wrong",
            }
        )
    layout = {
        "yaxis": {"tickformat": ".0%", "rangemode": "tozero"} | _named(f"wrong ({split} split)"),
        "xaxis": {"type": "category", "showgrid": False},
        "barmode": "group",
    }
    caption = "Percent of the rows with a known label that are named wrongly; less is better."
    return _figure(traces, "Mistakes at every level", caption, layout)


def _named(title: str) -> dict[str, Any]:
    return {"title": {"text": _text(title)}}


def _whole(title: str, most: float) -> dict[str, Any]:
    """An axis of whole numbers up to `most`."""
    return _named(title) | {"tick0": 0, "dtick": max(1, math.ceil(most / 12))}


def _text(text: str) -> str:
    return html.escape(text, quote=False)
