"""Folders and files: where the runs go, what earlier searches left there, where the data lie."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from hiertune._programs import as_typed
from hiertune.doctor.finding import Case, Finding, ok, probe, problem, warning
from hiertune.doctor.machine import GIB, MIB, size
from hiertune.errors import InputError
from hiertune.search.outputs import RunFolder
from hiertune.tracking import delivery
from hiertune.tracking.spool import SPOOL, summarise

_NETWORK = (
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "cifs",
    "smb3",
    "ceph",
    "fuse.sshfs",
    "fuse.glusterfs",
    "9p",
)
"""File systems on which HDF5's locks fail or hang now and then."""
_MOST_NAMED = 5
_STALE_LOCK_S = 120.0


def check_runs(case: Case) -> Iterator[Finding]:
    yield writable("runs folder", case.runs)


def writable(check: str, folder: Path) -> Finding:
    """Whether a megabyte can really be written there. It goes to a file without a name, and nothing stays."""
    folder = folder.absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    why = "a search writes its record, checkpoints and model there"
    if not existing.is_dir():
        return problem(check, f"{existing} is a file", why, "another folder (--runs)")
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"\0" * MIB)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        what = f"{existing} can't be written: {error.strerror}"
        return problem(
            check, what, why, "make room or set its permissions, or choose another folder (--runs)"
        )
    free = shutil.disk_usage(existing).free
    what = f"{folder} has {size(free)} free"
    if free < GIB:
        found = problem if free < GIB / 10 else warning
        return found(check, what, why, "make room, or choose another folder (--runs)")
    return ok(check, what)


def check_leftovers(case: Case) -> Iterator[Finding]:
    """Of earlier searches: what was not delivered, what was broken off, locks, unfinished files."""
    if not case.runs.is_dir():
        return
    found: list[Finding] = []
    for folder in sorted(case.runs.iterdir()):
        if folder.is_dir() and not folder.is_symlink() and _is_search(folder):
            found += _leftovers(RunFolder(folder))
    yield from found or [ok("leftovers", f"none in {case.runs}")]


def _is_search(folder: Path) -> bool:
    return RunFolder(folder).begun or (folder / SPOOL).exists()


def _leftovers(run: RunFolder) -> Iterator[Finding]:
    name = run.root.name
    alive = _runs_now(run.root)
    try:
        state = delivery(run.root) if (run.root / SPOOL).exists() else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = "its metrics can't be delivered"
        yield problem(
            "leftovers", f"{name}: {SPOOL} can't be read: {error}", why, f"look at {run.root / SPOOL}"
        )
        state = None
    if state is not None and not state.complete and not alive:
        missing = state.total - state.delivered
        why = "they are only in the run folder, not in MLflow" + (f" ({state.error})" if state.error else "")
        yield warning(
            "leftovers",
            f"{name}: {missing:,} of {state.total:,} points are not delivered",
            why,
            f"{as_typed('hiertune')} track sync {shlex.quote(str(run.root))}",
        )
    if not alive and run.begun and not run.summary.exists():
        why = "its finished trials are kept, and it has no winner yet"
        advice = "the command that began it, with --resume; or remove the folder"
        yield warning("leftovers", f"{name}: was broken off", why, advice)
    for lock in sorted(run.root.glob("ledger.log*.lock")):
        age = time.time() - lock.lstat().st_mtime
        if age > _STALE_LOCK_S and not alive:
            why = "opening the ledger waits until the lock is taken to be dead"
            yield warning(
                "leftovers",
                f"{name}: {lock.name} is {age / 60:.0f} minutes old",
                why,
                f"rm {shlex.quote(str(lock))}",
            )


def _runs_now(folder: Path) -> bool:
    """Whether the process that writes the spool is there. Searches on other machines seem ended."""
    try:
        header = summarise(folder)
        return not header.closed and Path(f"/proc/{int(header.header['pid'])}").exists()
    except (OSError, ValueError, KeyError, TypeError):
        return False


# ------------------------------------------------------------------------------- space and data


def check_space(case: Case) -> Iterator[Finding]:
    """All that `hiertune search` checks before it starts, in a process of its own: HDF5 files that are
    damaged on purpose can hang or crash the library."""
    if case.space is not None:
        yield from probe("space", {"space": str(case.space), "runs": str(case.runs)}, 60.0, "space")


def check_data_files(case: Case) -> Iterator[Finding]:
    """The file system of the data, and whether it can lock files as HDF5 does."""
    for path in _data_files(case):
        if not path.is_file():
            continue  # the check of the space says so
        kind = filesystem_of(path)
        forced = case.environment.get("HDF5_USE_FILE_LOCKING", "").upper() in ("TRUE", "1", "BEST_EFFORT")
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            why = "some program is writing it, and rows may change while they are read"
            yield problem("data files", f"{path.name} is locked", why, "wait until it is written")
            continue
        except OSError as error:
            found = problem if forced else warning
            why = "hiertune reads without locks, but imports to this place and other programs use them"
            advice = "export HDF5_USE_FILE_LOCKING=FALSE"
            yield found(
                "data files", f"{path.name} is on {kind}, which does not lock ({error.strerror})", why, advice
            )
            continue
        if kind in _NETWORK and case.environment.get("HDF5_USE_FILE_LOCKING", "").upper() not in (
            "FALSE",
            "0",
        ):
            why = "HDF5's locks fail there now and then; and each worker reads all of it over the network"
            advice = "export HDF5_USE_FILE_LOCKING=FALSE, and copy the file to a local disk of each node"
            yield warning("data files", f"{path.name} is on {kind}", why, advice)
        else:
            yield ok("data files", f"{path.name} is on {kind}")


def _data_files(case: Case) -> Iterator[Path]:
    if case.space is None or case.config is None:
        return
    from hiertune.space import load_space

    try:
        space = load_space(case.space)
    except InputError:
        return
    for config in space.data_configs():
        if not config.path.startswith("builtin:"):
            yield (case.space.parent / Path(config.path).expanduser()).absolute()


def filesystem_of(path: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """The kind of file system that holds `path`; `unknown` where the system doesn't say."""
    if not mounts.exists():
        return "unknown"
    best, kind = -1, "unknown"
    for line in mounts.read_text("utf-8", "replace").splitlines():
        fields = line.split(" ")
        point = Path(fields[1].encode().decode("unicode_escape"))
        if path.resolve().is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), fields[2]
    return kind
