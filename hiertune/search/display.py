"""The search in the terminal while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from hiertune._text import visible
from hiertune.config import TrialConfig
from hiertune.search.budget import Ending
from hiertune.search.ledger import Mode, TrialRecord

_MARKS = {"completed": "[green]✔[/]", "pruned": "[yellow]◦[/]", "failed": "[red]✘[/]"}
_MOST_SHOWN = 20
"""Running trials with a line of their own: to draw a thousand takes the time of a hundred epochs' reports."""


def redraws(console: Console) -> bool:
    """Whether what was printed can be drawn over; in a file it can't, nor where TERM is `dumb`."""
    return console.is_terminal and not console.is_dumb_terminal


class Display:
    """Listener that shows progress. In a terminal one live block; elsewhere a line per trial.

    Args:
        waits: whether a trial that was begun is not trained now.
    """

    def __init__(
        self,
        console: Console,
        total: int,
        metric: str,
        mode: Mode,
        footer: Callable[[], str],
        waits: Callable[[int], bool] = lambda number: False,
    ) -> None:
        self._console = console
        self._metric = metric
        self._mode = mode
        self._footer = footer
        self._waits = waits
        self._running: dict[int, tuple[int, int, float | None, float]] = {}
        self._best: TrialRecord | None = None
        self._last: list[str] = []
        self._status = ""
        self._notice = ""
        self._epoch_s: dict[int, float] = {}
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._total = total
        self._task = self._bar.add_task("trials", total=total)
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True)

    def __enter__(self) -> Display:
        if redraws(self._console):
            self._live.start()
        return self

    def __exit__(self, *exc_info) -> None:
        if redraws(self._console):
            self._live.stop()

    def say(self, status: str) -> None:
        """What goes on, where no trial shows it."""
        self._status = status
        if not redraws(self._console):
            self._console.print(f"[dim]{escape(status)}[/]", highlight=False)

    def note(self, text: str) -> None:
        """A line that stays, above what changes."""
        self._console.print(escape(text), highlight=False)

    def stopping(self, ending: Ending | None) -> None:
        """Why it is going to end: by `ending`, or by the user's wish. Called from another thread."""
        self._notice = self._stopping(ending)
        if not redraws(self._console):
            self.note(self._notice)

    def _stopping(self, ending: Ending | None) -> str:
        if ending is not None and not ending.cuts:
            return f"{ending.reason}: the running ones end, then the winner is measured"
        longest = max((self._epoch_s.get(number, 0.0) for number in list(self._running)), default=0.0)
        epochs = "the current epochs" + (f" (of about {_about(longest)})" if longest >= 10 else "")
        if ending is None:
            return f"stopping after {epochs}; Ctrl-C again stops at once"
        return f"{ending.reason}: {epochs} end, then the winner is measured"

    def resumed(self, records: list[TrialRecord]) -> None:
        """Trials that ended before this run of the search; there may be more of them than it is to have."""
        self._bar.update(self._task, total=max(self._total, len(records)))
        for record in records:
            self._count(record)

    def trial_started(self, number: int, config: TrialConfig, params: dict) -> None:
        self._running[number] = (0, config.train.epochs, None, time.monotonic())

    def trial_reported(self, number: int, epoch: int, metrics: dict[str, float]) -> None:
        _, epochs, _, begun = self._running[number]
        self._running[number] = (epoch, epochs, metrics[self._metric], begun)
        self._epoch_s[number] = metrics.get("epoch_seconds", 0.0)
        self._status = ""

    def trial_ended(self, record: TrialRecord) -> None:
        self._running.pop(record.number, None)
        self._count(record)
        best = self._best is not None and self._best.number == record.number
        value = "" if record.value is None else f"{record.value:.4f}"
        reason = escape(visible(record.reason or ""))
        line = (
            f"{_MARKS[record.state]} trial {record.number:>3}  {value:<7} "
            f"{record.epochs:>3} epochs {record.seconds:6.1f} s  "
            f"{'[bold green]best so far[/]' if best else ''}{reason}{_survived(record)}"
        )
        if redraws(self._console):
            self._last = [*self._last, line][-6:]
        else:
            self._console.print(line, highlight=False)

    def _count(self, record: TrialRecord) -> None:
        self._bar.advance(self._task)
        if record.state == "completed":
            known = [record] if self._best is None else [self._best, record]
            self._best = min(known, key=lambda each: each.rank(self._mode))

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = [self._bar]
        if self._best is not None:
            parts.append(
                Text.from_markup(
                    f"best   [bold]{self._best.value:.4f}[/] {escape(self._metric)} "
                    f"(trial {self._best.number})"
                )
            )
        parts += [Text.from_markup(line) for line in self._last]
        live = sorted(self._running.items())  # at once: this is another thread
        running = [item for item in live if not self._waits(item[0])]
        for number, (epoch, epochs, value, begun) in running[:_MOST_SHOWN]:
            shown = "" if value is None else f"{value:.4f}"
            parts.append(
                Text.from_markup(
                    f"[cyan]▸[/] trial {number:>3}  {shown:<7} {epoch:>3}/{epochs} epochs "
                    f"{time.monotonic() - begun:6.1f} s"
                )
            )
        if len(running) > _MOST_SHOWN:
            parts.append(Text(f"  and {len(running) - _MOST_SHOWN} more", style="dim"))
        if waiting := len(live) - len(running):
            parts.append(Text(f"  {waiting} waiting", style="dim"))
        if self._status:
            parts.append(Text(self._status, style="dim"))
        if self._notice:
            parts.append(Text(self._notice, style="yellow"))
        parts.append(Text(self._footer(), style="dim"))
        return Group(*parts)


def _about(seconds: float) -> str:
    """Rounded, for people who wait."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _survived(record: TrialRecord) -> str:
    """What befell a trial that went on, in a few words."""
    if not record.incidents:
        return ""
    times = "" if record.attempts == 2 else f"{record.attempts - 1} times, last "
    return f" [dim](went on: {times}{escape(visible(record.incidents[-1]['reason']))})[/]"
