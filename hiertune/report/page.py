"""The page: what is said in words and tables, and the template that holds it all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import plotly.offline

from hiertune._files import replace_file
from hiertune.report import figures
from hiertune.report.read import PARAM, Search, read_search

MOST_LEADERS = 20
_AS_TRAINED: Mapping[str, Any] = {
    "rule": None,
    "name": "as trained",
}  # of searches that chose no way of decoding


@dataclass(frozen=True)
class Table:
    header: list[str]
    rows: list[list[str]]
    marked: int | None = None
    """Row that stands out."""


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` of a finished, running or broken-off search; one file that needs no network.

    Raises:
        InputError: `run_dir` is not the folder of a search, or a file in it is damaged.
    """
    run_dir = Path(run_dir)
    search = read_search(run_dir)
    path = run_dir / "report.html"
    replace_file(path, _render(search).encode())
    return path


def _render(search: Search) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}  # browsers read no NaN
    contenders = _contenders(search)
    charts = {
        "levels": figures.level_bars(contenders, "val" if search.summary is None else "test"),
        "history": figures.history(search),
        "curves": figures.learning_curves(search),
        "importance": figures.importance(search),
        "slices": figures.slices(search),
    }
    return environment.get_template("report.html.j2").render(
        search=search,
        facts=_facts(search),
        comparisons=_comparisons(search),
        decoding=_decoding(search),
        contenders=_contender_table(contenders),
        settings=_settings(search),
        counts=search.trials["state"].value_counts().to_dict(),
        reasons=_reasons(search),
        leaders=_trial_table(search, search.ranked.head(MOST_LEADERS), by_rank=True),
        everything=_trial_table(search, search.trials, by_rank=False),
        charts=charts,
        provenance=_provenance(search),
        # The library is markup of ours; all else on the page is escaped.
        plotly=jinja2.utils.markupsafe.Markup(plotly.offline.get_plotlyjs()),
    )


# ----------------------------------------------------------------------------------------- words


def _facts(search: Search) -> list[tuple[str, str]]:
    """The figures under the headline: value and what it is."""
    trials, best = search.trials, search.best
    facts = []
    if best is not None:
        value = trials.loc[trials["trial"] == best, "objective"].iloc[0]
        facts.append((score(value), f"{search.metric}, trial {best}"))
    if search.summary is not None:
        tested = search.metric.replace("val/", "test/", 1)
        if tested in search.summary["winner"]["metrics"]:
            facts.append((score(search.summary["winner"]["metrics"][tested]), tested))
    facts.append((str(len(trials)), "trials"))
    if search.summary is not None:
        facts.append((duration(search.summary["seconds"]), "in all"))
    epochs = trials["epochs"].sum()
    if epochs:
        facts.append((f"{epochs:,.0f}", "epochs trained"))
    return facts


def _comparisons(search: Search) -> list[str]:
    """One sentence per control: the winner's lead, and whether it could be chance."""
    sentences = []
    controls = {} if search.summary is None else search.summary["controls"]
    for label, control in controls.items():
        against = control.get("against_winner")
        if against is None:
            continue
        if against["difference"] is None:
            sentences.append(
                f"Against {_words(label)}: –, as the test rows whose class has training rows are too few"
                f" to compare ({against['rows']})."
            )
            continue
        points, low, high = (100 * against[key] for key in ("difference", "low", "high"))
        sentence = (
            f"Against {_words(label)}: {points:+.1f} points of accuracy at the finest level (95% interval"
            f" {low:+.1f} to {high:+.1f}, p = {against['p_value']:.2g}; {against['rows']} test rows whose"
            " class has training rows)"
        )
        if low <= 0 <= high:
            sentence += ": not to be told from chance"
        sentences.append(sentence + ".")
    return sentences


def _decoding(search: Search) -> str | None:
    """One sentence on how the winner's logits become names, if a rule was chosen for that."""
    decoding = (
        _AS_TRAINED if search.summary is None else search.summary["winner"].get("decoding", _AS_TRAINED)
    )
    if decoding["rule"] is None:
        return None
    before, after = (decoding["val"][when][search.metric] for when in ("before", "after"))
    tried = f"of {decoding['tried']} ways to turn its logits into names"
    if decoding["name"] == "as trained":
        return f"The winner names as trained: {tried} none has a better {search.metric} ({score(before)})."
    return (
        f"The winner, decoded: {decoding['name']}, {tried} the best by {search.metric} ({score(before)} as"
        f" trained, {score(after)} so)."
    )


def _words(label: str) -> str:
    return label.replace("_", " ")


def _contenders(search: Search) -> dict[str, dict[str, float]]:
    """Metrics of the winner and its controls; of the best trial alone while there is no winner."""
    if search.summary is not None:
        winner = {"winner": search.summary["winner"]["metrics"]}
        decoding = search.summary["winner"].get("decoding", _AS_TRAINED)
        if decoding["name"] != "as trained":
            winner["winner, decoded"] = decoding["test"]
        controls = {
            _words(label): control["metrics"] for label, control in search.summary["controls"].items()
        }
        return winner | controls
    if search.best is None:
        return {}
    row = search.trials[search.trials["trial"] == search.best].iloc[0]
    metrics = {
        str(name): value
        for name, value in row.items()
        if str(name).startswith("val/") and not _missing(value)
    }
    return {f"trial {search.best}": metrics}


def _settings(search: Search) -> list[tuple[str, str]]:
    """The leader's parameters."""
    if search.best is None:
        return []
    row = search.trials[search.trials["trial"] == search.best].iloc[0]
    return [(name, cell(row[PARAM + name])) for name in search.params if not _missing(row[PARAM + name])]


def _provenance(search: Search) -> list[tuple[str, str]]:
    if search.summary is None:
        return []
    summary = search.summary
    data, tracking = summary["data"], summary.get("tracking")
    rows = [
        ("seed", str(summary["seed"])),
        ("data", f"{data['path']}, {data['rows']} rows, fingerprint {data['fingerprint'][:16]}"),
        ("winner trained on", "train + validation" if summary["refit"] else "train"),
        ("versions", ", ".join(f"{name} {version}" for name, version in summary["versions"].items())),
    ]
    if tracking is not None:
        done = f"{tracking['delivered']} of {tracking['total']} values delivered"
        rows.append(("tracking", f"{tracking['uri']}, {done}"))
    return rows


# ---------------------------------------------------------------------------------------- tables


def _contender_table(contenders: Mapping[str, Mapping[str, float]]) -> Table | None:
    """Test metrics side by side; the best of each row carries a star.

    Losses come last and without one: each contender has its own, so they do not compare.
    """
    names = [name for name in next(iter(contenders.values()), {}) if name.startswith("test/")]
    names.sort(key=_is_loss)
    if not names:
        return None
    rows = []
    for name in names:
        values = [metrics.get(name, math.nan) for metrics in contenders.values()]
        sign = -1 if "distance" in name else 1
        best = max((sign * value for value in values if not math.isnan(value)), default=math.nan)
        starred = len(values) > 1 and not _is_loss(name)
        cells = [score(value) + (" ★" if starred and sign * value == best else "") for value in values]
        rows.append([name.removeprefix("test/"), *cells])
    return Table(["on the test split", *contenders], rows)


def _is_loss(name: str) -> bool:
    return name.startswith("test/loss")


def _trial_table(search: Search, trials: pd.DataFrame, by_rank: bool) -> Table:
    short = dict(zip(search.params, short_names(search.params), strict=True))
    used = [name for name in search.params if trials[PARAM + name].notna().any()]
    header = ["trial", "state", search.metric, "epochs", "seconds", *(short[name] for name in used)]
    rows = []
    for position, (_, row) in enumerate(trials.iterrows(), start=1):
        state = row["state"] if _missing(row["reason"]) or by_rank else f"{row['state']}: {row['reason']}"
        first = [str(position)] if by_rank else []
        values = [row["epochs"], row["seconds"], *(row[PARAM + name] for name in used)]
        rows.append([*first, str(row["trial"]), state, score(row["objective"]), *map(cell, values)])
    marked = list(trials["trial"]).index(search.best) if search.best in set(trials["trial"]) else None
    return Table(["rank", *header] if by_rank else header, rows, marked)


def _reasons(search: Search) -> list[tuple[str, int]]:
    """Why trials ended early: how often each reason was given, most frequent first."""
    ended = search.trials[search.trials["state"] != "completed"]
    texts = [
        f"{state}: {reason}"
        for state, reason in zip(ended["state"], ended["reason"], strict=True)
        if not _missing(reason)
    ]
    return [(str(text), int(count)) for text, count in pd.Series(texts, dtype=object).value_counts().items()]


def short_names(names: Iterable[str]) -> list[str]:
    """Each key path cut to its last parts, as few as tell it from the others."""
    split = [name.split(".") for name in names]
    short = []
    for parts in split:
        for length in range(1, len(parts) + 1):
            tail = parts[-length:]
            if sum(other[-length:] == tail for other in split) == 1:
                break
        short.append(".".join(parts[-length:]))
    return short


def score(value: float) -> str:
    """A metric: all of a column to as many digits."""
    return "–" if math.isnan(value) else f"{value:.4f}"


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if _missing(value):
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e6 else f"{value:.4g}"
    return str(value)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
