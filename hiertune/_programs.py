"""How a user types the programs that came with this installation."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

SUBMITTED_BY = "HIERTUNE_SUBMITTED_BY"
"""Environment variable of a search that was submitted to a cluster: the command that did so, with the space
file, ready for the shell of the machine where it was typed. The same command goes on with the search."""


def near(path: Path) -> str:
    """A path as it is best typed: below this folder relative to it, else absolute."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def as_typed(name: str) -> str:
    """The console script `name`, ready for the shell that this was started from.

    Its bare name where PATH leads to it; else its path, as when a script ran `.venv/bin/python`
    without entering the environment; else `python -m name`.
    """
    beside = Path(sys.executable).parent / name
    found = shutil.which(name)
    if found is not None and Path(found).resolve() == beside.resolve():
        return name
    if beside.exists():
        return shlex.quote(_shown(beside))
    return f"{shlex.quote(_shown(Path(sys.executable)))} -m {name}"


def _shown(path: Path) -> str:
    """With a slash in any case: a bare name would be looked for on PATH."""
    if not path.is_relative_to(Path.cwd()):
        return str(path)
    return os.path.join(os.path.relpath(path.parent), path.name)
