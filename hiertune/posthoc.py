"""`hiertune decode`: how the winner of a finished search names, chosen anew on its validation logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from hiertune.decoding import Tried, ValidationLogits, best_of, try_rules
from hiertune.errors import InputError
from hiertune.export import read_head, save_decoding
from hiertune.search.outputs import RunFolder


def decode_winner(run_dir: str | Path, metric: str | None, *, save: bool, console: Console) -> Tried:
    """Show what every decoding rule makes of the winner's validation logits, and return the best one.

    `metric` is by default the search's objective. With `save` the model in `run_dir` names by that rule.

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
        best = best_of(tried, chosen_by, _mode(chosen_by, objective))
    except InputError as error:
        raise InputError(error.problem, key="--metric", allowed=error.allowed) from None
    console.print(_table(tried, best, chosen_by, taxonomy.levels[-1]))
    if save:
        save_decoding(run.model, best.rule)
        console.print(f"{run.model} now names so: {best.rule}", highlight=False)
    return best


def _finished(run: RunFolder) -> dict[str, Any]:
    try:
        return json.loads(run.summary.read_text("utf-8"))
    except OSError:
        raise InputError(
            "has no winner (yet)", file=run.root, allowed="the folder of a finished search, runs/NAME"
        ) from None
    except ValueError as error:
        raise InputError(f"can't be read: {error}", file=run.summary) from error


def _mode(metric: str, objective: dict[str, Any]) -> Literal["max", "min"]:
    if metric == objective["metric"]:
        return objective["mode"]
    return "min" if metric.endswith("distance") else "max"


def _table(tried: list[Tried], best: Tried, metric: str, finest: str) -> Table:
    """One row per rule; the chosen one stands out."""
    metrics = [f"val/accuracy/{finest}", "val/chain_accuracy", "val/hierarchical_distance"]
    columns = list(dict.fromkeys([metric, *metrics]))
    table = Table(title="On the validation split", title_justify="left", show_edge=False)
    table.add_column("")
    table.add_column("rule")
    for name in columns:
        table.add_column(name.removeprefix("val/"), justify="right")
    for each in tried:
        values = (f"{each.metrics[name]:.4f}" for name in columns)
        table.add_row(
            "★" if each is best else "", str(each.rule), *values, style="bold" if each is best else ""
        )
    return table
