"""`hiertune decode`: how the winner of a finished search names, chosen anew on its validation logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hiertune._text import visible
from hiertune.decoding import AS_TRAINED, Tried, ValidationLogits, best_of, try_rules
from hiertune.errors import InputError
from hiertune.export import read_head, save_decoding
from hiertune.search.outputs import RunFolder

_BEST_SHOWN = 8
_NEEDED = (("objective", "metric", str), ("objective", "mode", str), ("winner", "trial", int))
"""Sections and keys of summary.json that are read here."""


def decode_winner(
    run_dir: str | Path, metric: str | None, *, save: bool, console: Console, show_all: bool = False
) -> Tried:
    """Show what decoding rules make of the winner's validation logits, and return the best one.

    `metric` is by default the search's objective. With `save` the model in `run_dir` names by that rule.
    Shown are the best rules and how the model names as trained, or with `show_all` every rule.

    Raises:
        InputError: the search has no winner yet, its logits were not kept, or `metric` is not decided by
            names.
    """
    run = RunFolder(Path(run_dir))
    summary = _finished(run)
    objective = summary["objective"]
    chosen_by = objective["metric"] if metric is None else metric
    head, taxonomy = read_head(run.model)
    path = run.logits(summary["winner"]["trial"])
    if not path.exists():
        raise InputError(
            "the winner's validation logits were not kept",
            file=path,
            allowed="a search with `search.decode` on, whose logits are not too large",
        )
    tried = try_rules(ValidationLogits.load(path, taxonomy), taxonomy, head)
    try:
        mode = _mode(chosen_by, objective)
        best = best_of(tried, chosen_by, mode)
    except InputError as error:
        raise InputError(error.problem, key="--metric", allowed=error.allowed) from None
    ranked = sorted(tried, key=lambda each: each.metrics[chosen_by], reverse=mode == "max")  # equals stay
    most = len(ranked) if show_all else _BEST_SHOWN
    shown = [each for place, each in enumerate(ranked) if place < most or each.rule == AS_TRAINED]
    console.print(_table(shown, best, chosen_by, taxonomy.levels[-1]))
    if len(shown) < len(ranked):
        console.print(f"{len(shown)} of {len(ranked)} rules; --all shows every one", highlight=False)
    if save:
        if not run.model.resolve().is_relative_to(run.root.resolve()):
            raise InputError("is a link to another place: nothing is written there", file=run.model)
        save_decoding(run.model, best.rule)
        text = f"{run.model} now names so: {best.rule}"
        console.print(escape(visible(text)), highlight=False, soft_wrap=True)
    return best


def _finished(run: RunFolder) -> dict[str, Any]:
    try:
        summary = json.loads(run.summary.read_text("utf-8"))
    except OSError:
        raise InputError(
            "has no winner (yet)", file=run.root, allowed="the folder of a finished search, runs/NAME"
        ) from None
    except ValueError as error:
        raise InputError(f"can't be read: {error}", file=run.summary) from error
    for section, key, kind in _NEEDED:
        part = summary.get(section) if isinstance(summary, dict) else None
        if not isinstance(part, dict) or type(part.get(key)) is not kind:
            problem = "is missing, or of another kind"
            allowed = "the summary of a finished search"
            raise InputError(problem, file=run.summary, key=f"{section}.{key}", allowed=allowed)
    return summary


def _mode(metric: str, objective: dict[str, Any]) -> Literal["max", "min"]:
    if metric == objective["metric"]:
        return objective["mode"]
    return "min" if metric.endswith("distance") else "max"


def _table(shown: list[Tried], best: Tried, metric: str, finest: str) -> Table:
    """One row per rule; the chosen one stands out."""
    headings = {
        f"val/accuracy/{finest}": finest,
        "val/chain_accuracy": "chain",
        "val/average_distance": "distance",
    }
    headings = {metric: metric.removeprefix("val/")} | headings
    title = f"On the validation split, best first by {metric}"
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("rule", no_wrap=True)
    for heading in headings.values():
        table.add_column(heading, justify="right", min_width=6, overflow="fold")
    for each in shown:
        values = (f"{each.metrics[name]:.4f}" for name in headings)
        table.add_row(
            "★" if each is best else "", each.rule.short, *values, style="bold" if each is best else ""
        )
    return table
