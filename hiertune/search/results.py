"""What a search prints before it starts (`--dry-run`) and when it is over."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hiertune._programs import SUBMITTED_BY, as_typed, near
from hiertune._summary import beyond
from hiertune._text import visible
from hiertune.config import SearchSection
from hiertune.record import recorded
from hiertune.search.budget import Ending, as_duration
from hiertune.search.ledger import Mode, TrialRecord
from hiertune.search.outputs import OPEN, count_ended, count_states
from hiertune.search.plan import SearchPlan
from hiertune.search.resume import space_of
from hiertune.tracking import Delivery, display_uri, runs_page, ui_command

_LEADERBOARD_ROWS = 10


def delivery_line(delivery: Delivery) -> str:
    """How far tracking is, for the terminal while the search runs."""
    text = f"tracking: {delivery.delivered} of {delivery.total} points delivered"
    if delivery.since is None:
        return f"{text} ({delivery.error})" if delivery.error else text
    since = time.strftime("%H:%M:%S", time.localtime(delivery.since))
    return f"{text}; {delivery.total - delivery.delivered} wait since {since}: {delivery.error}"


def delivered_line(delivery: Delivery, run: Path) -> str:
    """What came of tracking, and for the runs of a search that has ended what to type for the rest."""
    text = f"{delivery.delivered} of {delivery.total} points delivered"
    if delivery.complete:
        return text
    if delivery.error and delivery.since is None and delivery.error.startswith("refused for good"):
        return f"{text}: {delivery.error}"
    why = f" ({delivery.error})" if delivery.error else ""
    return f"{text}{why}; `{sync_command(run)}` delivers the rest"


def sync_command(run: Path) -> str:
    words = [as_typed("hiertune"), "track", "sync", shlex.quote(run.name)]
    if run.parent != Path("runs").resolve():
        words += ["--runs", shlex.quote(near(run.parent))]
    return " ".join(words)


def print_results(
    console: Console,
    plan: SearchPlan,
    records: list[TrialRecord],
    summary: dict[str, Any],
) -> None:
    """The leaderboard, the winner beside its controls, and what to type next."""
    winner, controls = summary["winner"], summary["controls"]
    states = ", ".join(f"{count} {state}" for state, count in summary["trials"].items())
    console.print()
    console.print(leaderboard(records, plan.metric, plan.mode))
    console.print()
    console.print(settings_table(winner["params"]))
    console.print()
    decoding = winner.get("decoding")  # older summaries have none
    renamed = decoding is not None and decoding["name"] != "as trained"
    rows = {
        "winner": winner["metrics"],
        **({"winner, decoded": decoding["test"]} if renamed else {}),
        **{label: row["metrics"] for label, row in controls.items()},
    }
    console.print(test_table(rows, plan.data.taxonomy.levels))
    if decoding is not None:
        console.print(escape(decoding_line(decoding, plan.metric)), highlight=False)
    for label, control in controls.items():
        console.print(_verdict(label, control["against_winner"]), highlight=False)
    console.print()
    if off := beyond(summary, plan.config.search):
        text = f"{switched(off, plan.config.search)}; what is shown was measured before"
        console.print(f"[yellow]note:[/] {text}", highlight=False)
    delivery = Delivery(*(summary["tracking"].get(name) for name in ("delivered", "total", "error", "since")))
    if (ended := ended_line(summary)) is not None:
        console.print(ended, highlight=False)
    console.print(
        f"{states} in {summary['seconds']:.0f} s; {escape(delivered_line(delivery, plan.folder.root))}",
        highlight=False,
        soft_wrap=True,
    )
    console.print()
    for what, command in next_commands(plan, summary, decode=renamed).items():
        console.print(f"[dim]{what:<28}[/][bold]{escape(command)}[/]", highlight=False, soft_wrap=True)


def switched(settings: list[str], search: SearchSection) -> str:
    """How settings of the search's end stand now."""
    return " and ".join(
        f"search.{name} is {'on' if getattr(search, name) else 'off'} now" for name in settings
    )


def ended_line(summary: dict[str, Any]) -> str | None:
    """Why a search has fewer trials than it was to have."""
    ended = summary.get("ended")  # older summaries have none
    return None if ended is None or ended["by"] == "trials" else ended["reason"]


def progress_line(records: list[TrialRecord], trials: int, goes_on: bool = True) -> str:
    """How far a search is that does not run, in one sentence.

    Args:
        trials: how many it shall have in all; those that were interrupted are the first to go on.
        goes_on: whether the budgets allow any.
    """
    states = count_states(records)
    ended = count_ended(states)
    epochs = [record.epochs for record in records if record.state == "running"]
    going = min(len(epochs), max(trials - ended, 0)) if goes_on else 0
    details = ", ".join(f"{states[state]} {state}" for state in states if state not in OPEN)
    # A resumed search may be asked for fewer than it has.
    text = f"{ended} of {trials} trials ended" if ended <= trials else f"{ended} trials ended"
    parts = [f"{text} ({details})" if details else text]
    if ended > trials:
        parts.append(f"{trials} were asked for")
    if outside := states.get("outside"):
        parts.append(f"{outside} outside the space")
    if going:
        one = "1 interrupted one goes" if going == 1 else f"{going} interrupted ones go"
        at = sorted(set(epochs[:going]))
        parts.append(f"{one} on from {'epoch' if len(at) == 1 else 'epochs'} {_listed(at)}")
    if left := len(epochs) - going:
        parts.append("1 interrupted one is left" if left == 1 else f"{left} interrupted ones are left")
    return ", ".join(parts)


def _listed(numbers: list[int]) -> str:
    if len(numbers) > 5:
        return f"{numbers[0]} to {numbers[-1]}"
    *others, last = map(str, numbers)
    return f"{', '.join(others)} and {last}" if others else last


def decoding_line(decoding: dict[str, Any], metric: str) -> str:
    """What came of choosing how logits become names; `decoding` is that of summary.json."""
    if decoding["rule"] is None:
        return f"decoding as trained: {decoding['reason']}"
    before, after = (f"{decoding['val'][when][metric]:.4f}" for when in ("before", "after"))
    if decoding["name"] == "as trained":
        return f"decoding as trained: none of {decoding['tried']} rules betters its {metric} of {before}"
    return f"decoded: {decoding['name']} ({metric} {before} -> {after}; best of {decoding['tried']} rules)"


def next_commands(plan: SearchPlan, summary: dict[str, Any], decode: bool = False) -> dict[str, str]:
    """What a user will want to type or open after a search."""
    folder, program = near(plan.folder.root), as_typed("hiertune")
    command, page = ui_command(plan.tracking_uri), runs_page(plan.tracking_uri)
    compare = "Compare the runs in MLflow"
    return {
        **({compare: page} if command is None else {compare: command, "  and open": page}),
        "Extend the search": extension(plan, _ending_of(plan, summary)),
        **({"Name as decoded": f"{program} decode {shlex.quote(folder)} --save"} if decode else {}),
        "Use the model": f"{program} predict {shlex.quote(folder)}/model INPUT",
        "Read the report": f"{folder}/report.html",
    }


def extension(plan: SearchPlan, ending: Ending) -> str:
    """What to type for twice of what ended the search."""
    if ending.by == "trials":
        return resume_command(plan, trials=f"{2 * ending.limit:.0f}")
    if ending.by == "time_budget":
        return resume_command(plan, **{"time-budget": as_duration(2 * ending.limit)})
    return f"{resume_command(plan)}  # after raising search.{ending.by} in {plan.space.file}"


def _ending_of(plan: SearchPlan, summary: dict[str, Any]) -> Ending:
    ended = summary.get("ended", {"by": "trials", "reason": "", "limit": plan.trials})  # older ones have none
    limit = ended["limit"]
    if ended["by"] == "trials":  # `--trials` may be less than there are
        limit = max(limit, count_ended(summary["trials"]))
    return Ending(ended["by"], ended["reason"], limit)


def resume_command(plan: SearchPlan, **instead: str) -> str:
    """What to type to go on with this search; `instead` replaces options that were given."""
    return search_command(plan, "--resume", **instead)


def search_command(plan: SearchPlan, *flags: str, **instead: str) -> str:
    submitted = os.environ.get(SUBMITTED_BY)
    words = [as_typed("hiertune"), "search", shlex.quote(str(plan.space.file)), *flags]
    if submitted:  # begins a search or goes on with it, and wants to be told where the runs are
        words = [submitted]
    runs = plan.folder.root.parent
    if submitted or runs != Path("runs").resolve():
        words += ["--runs", shlex.quote(near(runs))]
    if plan.config.name != plan.space.config.name:
        words += ["--name", plan.config.name]
    for option, value in {**plan.given, **instead}.items():
        words += [f"--{option}", shlex.quote(value)]
    return " ".join(words)


def _verdict(label: str, against: dict[str, Any]) -> str:
    name = escape(label.replace("_", " "))
    if against["difference"] is None:
        return f"winner against {name}: – (n={against['rows']}, too few to compare)"
    points = 100 * against["difference"]
    interval = (
        f"95% interval {100 * against['low']:+.1f} to {100 * against['high']:+.1f}, n={against['rows']}"
    )
    if against["low"] > 0:
        verdict = "[green]better[/]"
    elif against["high"] < 0:
        verdict = "[red]worse[/]"
    else:
        verdict = "[yellow]not distinguishable[/]"
    return f"winner against {name}: {points:+.1f} points ({interval}): {verdict}"


def leaderboard(records: list[TrialRecord], metric: str, mode: Mode) -> Table:
    """The best completed trials, with the settings in which they differ."""
    completed = [record for record in records if record.state == "completed"]
    completed = sorted(completed, key=lambda record: record.rank(mode))[:_LEADERBOARD_ROWS]
    names = sorted({name for record in completed for name in record.params})
    differing = [name for name in names if len({record.params.get(name) for record in completed}) > 1]
    table = Table(title=f"Leaderboard by {metric}", title_justify="left", show_edge=False)
    table.add_column("#", justify="right")
    table.add_column("trial", justify="right")
    table.add_column("value", justify="right", style="bold")
    table.add_column("settings that differ", overflow="fold")
    for rank, record in enumerate(completed, start=1):
        settings = "  ".join(
            f"[dim]{escape(_short(name, names))}[/]\N{NO-BREAK SPACE}{escape(_show(record.params[name]))}"
            for name in differing
            if name in record.params
        )
        table.add_row(str(rank), str(record.number), f"{record.value:.4f}", settings)
    return table


def test_table(rows: dict[str, dict[str, float]], levels: tuple[str, ...]) -> Table:
    """The winner beside its controls on the test split; one row per metric."""
    table = Table(title="On the test split, read once", title_justify="left", show_edge=False)
    table.add_column("metric", no_wrap=True)  # rather fold the headings of a narrow terminal
    for label in rows:
        table.add_column(escape(label.replace("_", " ")), justify="right")
    metrics = [f"accuracy_seen/{levels[-1]}", *(f"accuracy/{level}" for level in reversed(levels))]
    for metric in [*metrics, "chain_accuracy", "hierarchical_distance", "average_distance"]:
        values = [row.get(f"test/{metric}") for row in rows.values()]
        table.add_row(escape(metric), *("–" if value is None else f"{value:.4f}" for value in values))
    return table


def settings_table(params: dict[str, Any]) -> Table:
    table = Table(title="The winner's settings", title_justify="left", show_edge=False, show_header=False)
    for name, value in sorted(params.items()):
        table.add_row(escape(name), escape(_show(value)))
    return table


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _short(name: str, others: list[str]) -> str:
    """The last part of a key path, or as many as tell it apart."""
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        tail = ".".join(parts[-length:])
        if sum(other.split(".")[-length:] == parts[-length:] for other in others) == 1:
            return tail
    return name


def print_plan(console: Console, plan: SearchPlan) -> None:
    """What a search would do: its parameters and the first question of every user, how many there are."""
    title = escape(visible(f"The space of {plan.space.file}"))
    table = Table(title=title, title_justify="left", show_edge=False)
    for heading in ("parameter", "distribution", "only when", "line"):
        table.add_column(heading, overflow="fold")
    for parameter in plan.space.parameters:
        table.add_row(
            *map(
                lambda cell: escape(visible(cell)),
                (parameter.name, str(parameter.distribution), parameter.condition, str(parameter.line)),
            )
        )
    console.print(table)
    size = plan.space.size()
    configs = "without end" if size == float("inf") else f"{size:,}"
    search = plan.config.search
    console.print(
        f"\n{configs} different configs; {plan.trials} trials of up to {plan.space.max_epochs} epochs with "
        f"{search.workers_per_trial} workers each\n"
        f"{plan.mode} {escape(plan.metric)}; sampler {search.sampler.kind}, "
        f"scheduler {search.scheduler.kind}; tracking to {escape(display_uri(plan.tracking_uri))}",
        highlight=False,
    )
    if plan.resume:
        console.print("\n" + escape(visible(outlook(plan), keep="\n")), highlight=False, soft_wrap=True)


def outlook(plan: SearchPlan) -> str:
    """What `--resume` does with a search that is there already; its ledger is only read."""
    folder, command = plan.folder, resume_command(plan)
    if plan.behind:
        return f"a search of this name exists in {folder.storage}; fetch it and go on with:\n  {command}"
    if not folder.root.exists():
        return f"a search of this name exists in {plan.ledger}; go on with:\n  {command}"
    text, records = recorded(plan.ledger) if folder.begun else ("", [])
    changed = text != "" and space_of(text, folder).tree != plan.space.tree
    revised = "; its space was changed: trials that this one can't produce will count no more" * changed
    progress = progress_line(records, plan.trials)
    return f"a search of this name exists: {folder.root}; {progress}{revised}; go on with:\n  {command}"
