"""What a search leaves behind in `runs/<name>/` (all but the report and the model)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiertune.errors import InputError

if TYPE_CHECKING:  # Optuna and pandas take seconds to load, and a refused search needs neither
    from hiertune.search.ledger import TrialRecord


class RunFolder:
    """`runs/<name>/` and the names of what is in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ledger = root / "ledger.log"
        self.space = root / "space.yaml"
        self.trials = root / "trials.csv"
        self.curves = root / "curves.csv"
        self.best = root / "best.yaml"
        self.summary = root / "summary.json"
        self.report = root / "report.html"
        self.log = root / "search.log"
        self.model = root / "model"
        self.ray = root / ".ray"

    def trial(self, number: int) -> Path:
        return self.root / "trials" / f"{number:04d}"

    def logits(self, number: int) -> Path:
        """Validation logits of a trial; they stay only of the best one."""
        return self.trial(number) / "val_logits.safetensors"

    def require_new(self) -> None:
        """InputError when a search of this name is there already."""
        if self.root.exists():
            raise InputError(
                f"a search of this name exists already: {self.root}",
                key="name",
                allowed="`--resume` to go on with it, or another name (`--name NAME`)",
            )

    def require_existing(self) -> None:
        """InputError when there is no search of this name to resume."""
        if not self.ledger.exists():
            raise InputError(
                f"there is no search to resume in {self.root}",
                key="name",
                allowed="the name of a search that was begun, or no `--resume`",
            )

    def create(self, space_text: str) -> None:
        self.root.mkdir(parents=True)
        self.space.write_text(space_text, encoding="utf-8")


def write_trials(path: Path, records: list[TrialRecord]) -> None:
    """One row per trial: id, state, fault, attempts, every parameter, every final metric, epochs, seconds."""
    import pandas as pd

    rows = [
        {
            "trial": record.number,
            "state": "interrupted" if record.state == "running" else record.state,
            "reason": record.reason,
            "fault": record.fault,
            "attempts": record.attempts,
            "epochs": record.epochs,
            "seconds": record.seconds,
            "objective": record.value,
            **{f"param/{name}": value for name, value in record.params.items()},
            **record.metrics,
        }
        for record in records
    ]
    _replace(path, pd.DataFrame(rows).to_csv(index=False))


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    _replace(path, json.dumps(summary, indent=2, sort_keys=False, allow_nan=False) + "\n")


def _replace(path: Path, text: str) -> None:
    """Readers see the old file or the new one, never half of it."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
