"""The file of a ledger: Optuna's journal (one JSON object a line), as one writer leaves it after a crash.

Optuna's own file backend locks with a link that outlives its process and waits half a minute for it, and
glues the next entry to a line that a crash cut short. A search holds a lock of its own for as long as it
runs, so this backend needs none; it cuts a torn last line away, and says where a file is damaged.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import BaseJournalBackend

from hiertune._files import sync
from hiertune.errors import InputError


class JournalFile(BaseJournalBackend):
    """Optuna's journal format in `path`, for many readers and one writer.

    Args:
        path: the file. A writer makes it if it is missing.
        writable: cut a torn last line away. Only for whoever holds the search's lock.
    """

    def __init__(self, path: Path, *, writable: bool) -> None:
        self._path = path
        self._next = (0, 0)  # number and offset of the first line that was not read
        self._synced = True
        self.line = 0
        """Number of the line that was read last, from 1."""
        if writable:
            if not path.exists():
                _create(path)
            _cut_torn_line(path)

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        number, offset = self._next if log_number_from == self._next[0] else (0, 0)
        with self._path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # torn by a crash, or being written
                entry = _decoded(line)
                if entry is None:
                    if number and not file.readline().endswith(b"\n"):
                        return  # nothing whole follows
                    raise InputError("is damaged", file=self._path, line=number + 1, allowed=_ALLOWED)
                number, offset = number + 1, offset + len(line)
                self._next, self.line = (number, offset), number
                if number > log_number_from:
                    yield entry

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        rest = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with self._path.open("ab", buffering=0) as file:  # a buffer would write what is left as it is closed
            begun = file.tell()
            try:
                while rest:
                    rest = rest[file.write(rest) :]
                if self._synced:
                    os.fsync(file.fileno())
            except OSError:
                os.truncate(self._path, begun)  # a full disk: half a line must not stay
                raise

    @contextlib.contextmanager
    def unsynced(self) -> Iterator[None]:
        """For many entries that mean nothing before a last one, which comes after: one wait for the disk."""
        self._synced = False
        try:
            yield
        finally:
            self._synced = True
        sync(self._path)


_ALLOWED = "a journal as Optuna writes it; nothing in it was changed"


def open_journal(path: Path, *, writable: bool = False) -> JournalStorage:
    """The storage in a journal file. InputError where it can't be read, naming the line."""
    backend = JournalFile(path, writable=writable)
    try:
        return JournalStorage(backend)
    except OSError as error:
        raise InputError(f"can't be read: {error.strerror}", file=path) from None
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AssertionError, AttributeError) as error:
        problem = f"is no entry of a journal ({type(error).__name__}: {error})"
        raise InputError(problem, file=path, line=backend.line, allowed=_ALLOWED) from None


def unsynced(storage: BaseStorage) -> AbstractContextManager[None]:
    """`JournalFile.unsynced` of a storage that has a journal; a database commits as it does."""
    backend = getattr(storage, "_backend", None)
    return backend.unsynced() if isinstance(backend, JournalFile) else contextlib.nullcontext()


def _decoded(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:  # of JSON or of UTF-8
        return None
    return entry if isinstance(entry, dict) else None


def _create(path: Path) -> None:
    path.touch()
    sync(path.parent)


def _cut_torn_line(path: Path) -> None:
    """Cut what follows the last whole entry: a line without an end, and a line before it that is no entry."""
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        whole, before = _line_ends(file, size)
        file.seek(before)
        if before and _decoded(file.read(whole - before)) is None:
            whole = before
        if whole < size:
            file.truncate(whole)
            os.fsync(file.fileno())


def _line_ends(file: BinaryIO, size: int) -> tuple[int, int]:
    """Offsets just behind the last line feed and the one before it; 0 where there is none."""
    block, tail = 1 << 16, b""
    while len(tail) < size and tail.count(b"\n") < 2:
        start = max(0, size - len(tail) - block)
        file.seek(start)
        tail = file.read(size - len(tail) - start) + tail
    last = tail.rfind(b"\n")
    before = tail.rfind(b"\n", 0, max(last, 0))
    start = size - len(tail)
    return (start + last + 1 if last >= 0 else 0), (start + before + 1 if before >= 0 else 0)
