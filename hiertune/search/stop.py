"""`hiertune stop`: asks a search that runs elsewhere to stop. Imports no Ray.

Nothing but the run folder is between the two, so it works from another machine that sees the folder.
"""

from __future__ import annotations

import csv
import os
import shlex
import time
from collections import Counter
from pathlib import Path

import filelock
from rich.console import Console
from rich.markup import escape

from hiertune._files import replace_file
from hiertune._programs import SUBMITTED_BY
from hiertune._text import visible
from hiertune.errors import InputError
from hiertune.search.interrupt import NOW, STOP
from hiertune.search.outputs import RunFolder

_POLL_S = 0.2


def stop_search(run: Path, now: bool, console: Console) -> None:
    """Ask the search in `run` to stop, wait until it has, and say how far it got.

    Raises:
        InputError: it does not run.
    """
    folder = RunFolder(run.resolve())
    try:
        if not _runs(folder):
            how = "has come to its end" if _has_ended(folder) else f"goes on with:\n  {_command(folder)}"
            raise InputError(f"{folder.root.name} is not running; it {how}", key="NAME")
        replace_file(folder.request, NOW if now else STOP)
    except OSError as error:
        allowed = "stop it as a user, and on a machine, that may write there"
        raise InputError(f"can't be asked: {error.strerror}", file=folder.root, allowed=allowed) from None
    waiting = "stopping" if now else "asked; the current epochs end first (Ctrl-C here ends only the waiting)"
    try:
        with console.status(waiting):
            while _runs(folder):
                time.sleep(_POLL_S)
    except KeyboardInterrupt:
        console.print(f"{folder.root.name} stops when its current epochs have ended", highlight=False)
        return
    console.print(escape(visible(_outcome(folder), keep="\n")), highlight=False, soft_wrap=True)


def write_command(folder: RunFolder, command: str) -> None:
    """Keep the command that resumes a search beside what it resumes."""
    # That of a job is typed elsewhere, and the job's own folder is temporary.
    where = "" if os.environ.get(SUBMITTED_BY) else f"cd {shlex.quote(os.getcwd())} && "
    replace_file(folder.resume, f"{where}{command}\n")


def _runs(folder: RunFolder) -> bool:
    lock = filelock.FileLock(folder.lock)
    try:
        with lock.acquire(timeout=0):
            return False
    except filelock.Timeout:
        return True


def _outcome(folder: RunFolder) -> str:
    states = _states(folder.trials)
    counts = ", ".join(f"{count} {state}" for state, count in states.items()) or "none was begun"
    if _has_ended(folder):
        return f"{folder.root.name} has come to its end; its trials: {counts}"
    return f"{folder.root.name} has stopped; its trials: {counts}; go on with:\n  {_command(folder)}"


def _has_ended(folder: RunFolder) -> bool:
    """Whether its winner was measured after its last trial."""
    if not (folder.summary.exists() and folder.trials.exists()):
        return False
    return folder.summary.stat().st_mtime >= folder.trials.stat().st_mtime


def _states(trials: Path) -> Counter[str]:
    if not trials.exists():
        return Counter()
    with trials.open(encoding="utf-8", errors="replace", newline="") as file:
        return Counter(row["state"] for row in csv.DictReader(file) if row.get("state"))


def _command(folder: RunFolder) -> str:
    """Without the folder that it is typed in, where that is this one."""
    if not folder.resume.exists():  # of a search that was begun before there were any
        return "hiertune search SPACE.yaml --resume"
    command = folder.resume.read_text(encoding="utf-8", errors="surrogateescape").strip()
    return command.removeprefix(f"cd {shlex.quote(os.getcwd())} && ")
