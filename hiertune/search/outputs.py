"""What a search leaves behind in `runs/<name>/` (all but the report and the model)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiertune._files import replace_file
from hiertune._text import visible
from hiertune.errors import InputError
from hiertune.storage import Folder, patiently

if TYPE_CHECKING:  # Optuna and pandas take seconds to load, and a refused search needs neither
    from hiertune.search.ledger import TrialRecord


LOGITS = "val_logits.safetensors"
SESSION = "session.json"
"""In storage: who runs the search."""
OWN = ".session"
"""In the run folder: the session that wrote it last, and where it is stored."""
_BEFORE_LEDGER = {"search.lock", "search.owner", "search.log", "stop-request"}
_SIGNS = {OWN, "curves.csv"}
"""A search that lost its ledger, or was not brought back whole, has one of these."""
OPEN = ("interrupted", "outside")
"""States of trials that may go on, or count again."""


def is_search(folder: Path) -> bool:
    """Whether a folder is one of a search that was begun."""
    marks = ("search.lock", "ledger.log", "ledger.json", "trials.csv", "summary.json")
    return any(os.path.exists(folder / mark) for mark in marks)  # pathlib raises for a name that is too long


class RunFolder:
    """`runs/<name>/` and the names of what is in it, and where workers read and write."""

    def __init__(self, root: Path, storage: Folder | None = None) -> None:
        """`storage`: the search's folder in storage; workers then write there, and not here."""
        self.root = root
        self.storage = storage
        self.ledger = root / "ledger.log"
        self.space = root / "space.yaml"
        """The present space; those of earlier revisions are beside it as `space.1.yaml`, ..."""
        self.trials = root / "trials.csv"
        self.curves = root / "curves.csv"
        self.best = root / "best.yaml"
        self.summary = root / "summary.json"
        self.report = root / "report.html"
        self.log = root / "search.log"
        self.model = root / "model"
        self.ray = root / ".ray"
        self.lock = root / "search.lock"
        """Held by the process that runs the search."""
        self.owner = root / "search.owner"
        """Who that is."""
        self.request = root / "stop-request"
        """How `hiertune stop` asks it to stop."""
        self.resume = root / "resume.sh"
        """The command that goes on with the search, as a script."""

    def earlier_space(self, revision: int) -> Path:
        return self.root / f"space.{revision}.yaml"

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

    def require_writable(self) -> None:
        """InputError where no search can be kept: below a file, or where nothing may be written."""
        existing = next(path for path in (self.root, *self.root.parents) if os.path.exists(path))
        if not existing.is_dir():
            raise _no_place(existing, "is a file")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise _no_place(existing, "can't be written")

    def make(self) -> None:
        """Make the folder; InputError where that can't be."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _no_place(self.root, f"can't be made: {error.strerror}") from None

    def remove_unused(self) -> None:
        """Remove a folder that has nothing but what a process writes when it takes it."""
        if set(os.listdir(self.root)) <= {*_BEFORE_LEDGER, OWN}:
            shutil.rmtree(self.root, ignore_errors=True)

    def require_own(self) -> None:
        """InputError for a folder of other things, which no search may write to."""
        if others := self._others():
            shown = ", ".join(sorted(others)[:3]) + (", ..." if len(others) > 3 else "")
            raise InputError(
                f"{self.root} is no search's, and holds other files: {visible(shown)}",
                key="name",
                allowed="another name (`--name NAME`), or another folder (`--runs`)",
            )

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
        if not self.begun and not self.is_bare:
            or_there = "" if self.storage is None else f", nor in {self.storage}"
            raise InputError(
                f"there is no search to resume in {self.root}{or_there}",
                key="name",
                allowed="the name of a search that was begun, or no `--resume`",
            )

    @property
    def begun(self) -> bool:
        """Whether there is a search to go on with: a journal, or the search's name in a database."""
        return self.ledger.exists() or self.ledger.with_suffix(".json").exists()

    @property
    def is_bare(self) -> bool:
        """A search that was killed before anything was recorded: it can begin again."""
        return self.root.exists() and not self.begun and not self.curves.exists() and not self._others()

    def _others(self) -> set[str]:
        """What lies in a folder that is no search's."""
        if self.begun or not self.root.exists():
            return set()
        names = set(os.listdir(self.root))
        return set() if names & _SIGNS else names - _BEFORE_LEDGER


def _no_place(path: Path, problem: str) -> InputError:
    return InputError(problem, file=path, key="--runs", allowed="a folder that this user may write to")


def state_of(record: TrialRecord) -> str:
    """A trial that runs while the search does not was interrupted."""
    return "interrupted" if record.state == "running" else record.state


def count_states(records: Iterable[TrialRecord]) -> dict[str, int]:
    """How many trials came to each end."""
    return dict(Counter(map(state_of, records)))


def count_ended(states: Mapping[str, int]) -> int:
    """How many of the trials in each state have ended, and count."""
    return sum(count for state, count in states.items() if state not in OPEN)


def write_trials(path: Path, records: list[TrialRecord]) -> None:
    """One row per trial: id, state, fault, attempts, every parameter, every final metric, epochs, seconds."""
    import pandas as pd

    from hiertune.record import row_of

    rows = [row_of(record) | {"state": state_of(record)} for record in records]
    replace_file(path, pd.DataFrame(rows).to_csv(index=False))


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    replace_file(path, json.dumps(summary, indent=2, sort_keys=False, allow_nan=False) + "\n")
