"""Findings in the terminal, and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hiertune._text import visible
from hiertune.doctor.finding import Finding

_MARKS = {"ok": ("✔", "green"), "warning": ("!", "yellow"), "problem": ("✘", "bold red")}


def print_findings(console: Console, found: Sequence[Finding]) -> None:
    """One row per finding; below what is not well, why it matters and what to do."""
    table = Table(box=None, show_header=False, pad_edge=False, expand=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in found:
        mark, style = _MARKS[finding.status]
        said = Text(visible(finding.what, keep="\n"))
        if finding.status != "ok":
            said.append(f"\n{visible(finding.why)}" if finding.why else "", "dim")
            said.append("\n→ ", style)
            said.append(visible(finding.advice, keep="\n"))
        table.add_row(Text(mark, style), Text(finding.check), said)
    console.print(table)
    counts = Counter(finding.status for finding in found)
    problems, warnings = counts["problem"], counts["warning"]
    if problems:
        style, text = "bold red", f"{problems} {'problem' if problems == 1 else 'problems'}"
    else:
        style, text = "bold green", "no problems"
    if warnings:
        text += f", {warnings} {'warning' if warnings == 1 else 'warnings'}"
    console.print(Text(text, style))


def as_json(found: Sequence[Finding]) -> str:
    """An object with `healthy` and, in the order of the checks, `findings`."""
    healthy = all(finding.status != "problem" for finding in found)
    return json.dumps({"healthy": healthy, "findings": [asdict(finding) for finding in found]}, indent=2)
