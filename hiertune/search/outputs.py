"""What a search leaves behind in `runs/<name>/` (all but the report and the model)."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiertune._text import without_passwords
from hiertune.errors import InputError
from hiertune.storage import Folder, patiently

if TYPE_CHECKING:  # Optuna and pandas take seconds to load, and a refused search needs neither
    from hiertune.search.ledger import TrialRecord


LOGITS = "val_logits.safetensors"
SESSION = "session.json"
"""In storage: who runs the search."""


class RunFolder:
    """`runs/<name>/` and the names of what is in it, and where workers read and write."""

    def __init__(self, root: Path, storage: Folder | None = None) -> None:
        """`storage`: the search's folder in storage; workers then write there, and not here."""
        self.root = root
        self.storage = storage
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
        """Validation logits of a trial, on this machine; they stay only of the best one."""
        return self.trial(number) / LOGITS

    def place(self, *parts: str) -> str:
        """Path or URI of something that workers write."""
        if self.storage is None:
            return str(self.root.joinpath(*parts))
        return str(self.storage.child("/".join(parts)) if parts else self.storage)

    def trial_place(self, number: int) -> str:
        return self.place("trials", f"{number:04d}")

    def logits_place(self, number: int) -> str:
        return self.place("trials", f"{number:04d}", LOGITS)

    def fetch_logits(self, number: int) -> None:
        """Copy a trial's validation logits from storage, if they are there and not here."""
        if self.storage is not None and not self.logits(number).exists():
            trial = self.storage.child(f"trials/{number:04d}")
            with contextlib.suppress(FileNotFoundError):
                patiently(trial.download, LOGITS, self.logits(number))

    def remove_trial(self, number: int) -> None:
        """Remove what a trial left here."""
        shutil.rmtree(self.trial(number), ignore_errors=True)

    def keep_logits(self, number: int) -> None:
        """Remove what a trial left here, but for its validation logits."""
        logits = self.logits(number)
        if not logits.exists():
            self.remove_trial(number)
            return
        for file in logits.parent.iterdir():
            if file != logits:
                file.unlink(missing_ok=True)

    def require_new(self) -> None:
        """InputError when a search of this name is there already, or in storage."""
        there: Path | Folder | None = self.root if self.root.exists() else None
        if there is None and self.storage is not None and self.storage.sizes(deep=True).keys() - {SESSION}:
            there = self.storage
        if there is not None:
            raise InputError(
                f"a search of this name exists already: {there}",
                key="name",
                allowed="`--resume` to go on with it, or another name (`--name NAME`)",
            )

    def require_existing(self) -> None:
        """InputError when there is no search of this name to resume."""
        if not self.ledger.exists():
            or_there = "" if self.storage is None else f", nor in {self.storage}"
            raise InputError(
                f"there is no search to resume in {self.root}{or_there}",
                key="name",
                allowed="the name of a search that was begun, or no `--resume`",
            )

    def create(self, space_text: str) -> None:
        """Make the folder with the space as given, but for passwords in addresses."""
        self.root.mkdir(parents=True)
        self.space.write_text(without_passwords(space_text), encoding="utf-8")


def write_trials(path: Path, records: list[TrialRecord]) -> None:
    """One row per trial: id, state, every parameter, every final metric, epochs, seconds."""
    import pandas as pd

    rows = [
        {
            "trial": record.number,
            "state": "interrupted" if record.state == "running" else record.state,
            "reason": record.reason,
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
