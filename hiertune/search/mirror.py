"""A search's run folder, kept in storage as well: `<storage>/<name>/`, from which another machine goes on.

    session.json                         who runs the search, rewritten as a sign of life
    space.yaml, best.yaml, *.csv, ...    whole files, as in the run folder
    ledger.log.parts/BEGIN-END-CRC       bytes of a file that only grows; so curves.csv, search.log, ...
    trials/0007/..., model/, controls/   written by the workers themselves

A part has a name of its own for each state it was ever in, and takes the place of the one before it: whatever
a crash leaves, the whole parts are told from torn ones by size and checksum, on any kind of store. They hold
whole lines only.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import re
import shutil
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hiertune import _process
from hiertune._text import without_passwords
from hiertune.errors import InputError
from hiertune.search.outputs import LOGITS, OWN, SESSION, RunFolder
from hiertune.storage import Folder, patiently

logger = logging.getLogger(__name__)

LEDGER = "ledger.log"
GROWING = ("tracking.jsonl", "curves.csv", LEDGER, "search.log")
"""Files that are only appended to, by lines. What the ledger says of trials, the first two must have too."""
WHOLE = ("*.yaml", "*.csv", "*.json", "*.html")

INTERVAL_S = 10.0
"""How often what is not a trial's end is sent."""
BEAT_S = 15.0
STALE_S = 90.0
"""A session without a sign of life for so long is over."""
PART_BYTES = 1 << 18
"""A part of this size is final, and the next one begins."""
_FAILURES = (OSError, ValueError, NotImplementedError)
"""What pyarrow's filesystems raise."""
_MOST_BYTES = 1 << 23
"""Sent at once at most."""


# ----------------------------------------------------------------------------------- sessions


@dataclass(frozen=True, kw_only=True)
class Session(_process.Process):
    """One process that runs the search."""

    id: str
    user: str
    begun: str
    ended: bool = False

    @classmethod
    def new(cls) -> Session:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return cls.this(id=uuid.uuid4().hex, user=_user(), begun=now)

    @classmethod
    def read(cls, folder: Folder) -> Session | None:
        try:
            return cls(**json.loads(folder.read_bytes(SESSION)))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            return None  # torn, or of another program: nothing that runs leaves it so for long

    def write(self, folder: Folder) -> None:
        folder.write_bytes(SESSION, json.dumps(asdict(self)).encode())

    @property
    def died(self) -> bool:
        """Whether it ran on this machine, and does no longer; or was an earlier one of this very process."""
        return self.lives is False or (self.lives is True and self.pid == os.getpid())


def refuse_running(folder: Folder) -> None:
    """InputError while another process runs this search. Time is the store's: clocks here may differ."""
    session = Session.read(folder)
    if session is None or session.ended or session.died:
        return
    seen = folder.modified(SESSION)
    name = f".now-{uuid.uuid4().hex}"
    folder.write_bytes(name, b"\n")
    now = folder.modified(name)
    folder.remove(name)
    if seen is None or now is None or now - seen > STALE_S:
        return
    raise InputError(
        f"the search in {folder} is being run by {session.user} on {session.host} (process {session.pid}) "
        f"since {session.begun}; its last sign of life is {max(now - seen, 0):.0f} s old",
        key="storage",
        allowed=f"one process at a time: stop that one, or wait until it was silent for {STALE_S:.0f} s",
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return str(os.getuid())


# -------------------------------------------------------------------------------------- parts


@dataclass(frozen=True)
class Part:
    """Bytes `begin` to `end` of a growing file."""

    begin: int
    end: int
    crc: int

    @classmethod
    def of(cls, begin: int, content: bytes) -> Part:
        return cls(begin, begin + len(content), zlib.crc32(content))

    @classmethod
    def named(cls, name: str) -> Part | None:
        match = re.fullmatch(r"(\d{15})-(\d{15})-([0-9a-f]{8})", name)
        return None if match is None else cls(int(match[1]), int(match[2]), int(match[3], 16))

    @property
    def name(self) -> str:
        return f"{self.begin:015d}-{self.end:015d}-{self.crc:08x}"

    def holds(self, content: bytes) -> bool:
        return len(content) == self.end - self.begin and zlib.crc32(content) == self.crc


def parts_of(folder: Folder) -> list[Part]:
    """The parts of a growing file that look whole, by their beginning, the longest first."""
    found = ((Part.named(name), size) for name, size in folder.sizes().items())
    whole = [part for part, size in found if part is not None and size == part.end - part.begin]
    return sorted(whole, key=lambda part: (part.begin, -part.end))


def read_parts(folder: Folder) -> bytes:
    """A growing file as far as storage has it without a gap."""
    content = bytearray()
    for part in parts_of(folder):
        if part.begin > len(content):
            break
        if part.end > len(content):
            piece = folder.read_bytes(part.name)
            if part.holds(piece):
                content[part.begin :] = piece
    return bytes(content)


class _Growing:
    """Sends what a file has grown by."""

    def __init__(self, path: Path, folder: Folder) -> None:
        self.path = path
        self._folder = folder
        self._begin = self._end = 0
        self._last: Part | None = None
        self._superseded: list[str] | None = None
        """Names to remove; None until it is known what storage has."""

    def look(self) -> list[str]:
        """Find out what storage has of this file. What is of an earlier life, or torn, is to go."""
        names = set(self._folder.sizes())
        kept: Part | None = None
        self._end = 0
        for part in parts_of(self._folder):
            if part.begin == self._end and part.holds(self._read(part.begin, part.end)):
                self._end, kept = part.end, part
                names.discard(part.name)
        self._begin, self._last = self._end, None
        if kept is not None and kept.end - kept.begin < PART_BYTES:
            self._begin, self._last = kept.begin, kept
        return sorted(names)

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def send(self, size: int | None = None) -> None:
        """Send the whole lines among the first `size` bytes, by default all."""
        if self._superseded is None or self.size < self._end:
            self._superseded = self.look()
        superseded = self._superseded
        size = self.size if size is None else size
        while self._end < size:
            content = self._read(self._begin, min(size, self._end + _MOST_BYTES))
            content = content[: content.rfind(b"\n") + 1]
            part = Part.of(self._begin, content)
            if part.end <= self._end:
                return
            self._folder.write_bytes(part.name, content)
            if self._last is not None:
                superseded.append(self._last.name)
            self._end, self._last = part.end, part
            if len(content) >= PART_BYTES:
                self._begin, self._last = part.end, None

    def tidy(self) -> None:
        while self._superseded:
            self._folder.remove(self._superseded[-1])
            self._superseded.pop()

    @property
    def missing(self) -> bool:
        return self.path.exists() and _whole_lines(self.path) > self._end

    def _read(self, begin: int, end: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(begin)
            return _masked(file.read(end - begin))


def _masked(content: bytes) -> bytes:
    """Passwords in addresses as so many stars: all other bytes stay where they are."""
    return without_passwords(content.decode("latin-1"), same_length=True).encode("latin-1")


def _whole_lines(path: Path) -> int:
    content = path.read_bytes()
    return content.rfind(b"\n") + 1


# ------------------------------------------------------------------------------------- mirror


class Mirror:
    """Sends what the run folder has to storage, from one background thread.

    Nothing here raises because of the store, and training never waits for it longer than `told` says: while
    it can't be reached the run folder is all there is, and what it lacks is sent once it is back.
    """

    def __init__(self, folder: RunFolder, say: Callable[[str], None] = lambda text: None) -> None:
        """Take over the search in `folder.storage`. `say` is told when the store is lost and found.

        Raises InputError while another process runs the search; OSError if the store fails.
        """
        assert folder.storage is not None
        self._folder, self._root, self._storage, self._say = folder, folder.root, folder.storage, say
        refuse_running(self._storage)
        folder.make()
        self.session = Session.new()
        self.session.write(self._storage)
        _note(self._root, self.session, self._storage)
        self.overtaken = False
        """Whether another machine took this search over. Nothing is sent any more."""
        self._growing = {
            name: _Growing(self._root / name, self._storage.child(f"{name}.parts")) for name in GROWING
        }
        self._sent: dict[str, tuple[int, int]] = {}
        self._removals: list[tuple[int, bool]] = []
        self._beaten = time.monotonic()
        self._problem: str | None = None
        self._asked = self._done = 0
        self._closing = False
        self._changed = threading.Condition()
        self.when_overtaken: Callable[[], object] = lambda: None
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def told(self, patience: float = 5.0) -> bool:
        """A trial was told: wait until the ledger is in storage, if the store answers; whether it is."""
        with self._changed:
            if self._problem is not None or self.overtaken:
                return False
            self._asked += 1
            asked = self._asked
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._done >= asked or self._problem is not None or self.overtaken, patience
            )
            return self._done >= asked

    def remove_trial(self, number: int) -> None:
        """Remove what a trial left, in storage soon."""
        self._folder.remove_trial(number)
        self._later(number, False)

    def keep_logits(self, number: int) -> None:
        """Remove a trial's checkpoints, but not its validation logits, soon."""
        self._later(number, True)

    def close(self, patience: float = 60.0) -> list[str]:
        """Send the rest and end the session. What is missing in storage after `patience` seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(patience)
        return [] if not self._thread.is_alive() and self._problem is None else self._missing()

    # ------------------------------------------------------------------------- its own thread

    def _run(self) -> None:
        full = 0.0
        while True:
            with self._changed:
                due = full if self._problem is None else time.monotonic()
                pause = max(0.0, due + INTERVAL_S - time.monotonic())
                self._changed.wait_for(
                    lambda: self._closing or (self._asked > self._done and self._problem is None), pause
                )
                closing, asked = self._closing, self._asked
            try:
                self._send_told(asked)
                if closing or time.monotonic() >= full + INTERVAL_S:
                    self._send_all()
                    full = time.monotonic()
                if closing and not self.overtaken:
                    replace(self.session, ended=True).write(self._storage)
            except _FAILURES as error:
                self._lost(error)
                if closing:
                    time.sleep(1.0)
                    continue
            else:
                self._found()
            if closing or self.overtaken:
                return

    def _send_told(self, asked: int) -> None:
        """What the ledger has now, after what was written to other files before it."""
        if self.overtaken:
            return
        size = self._growing[LEDGER].size
        for name in GROWING[: GROWING.index(LEDGER)]:
            self._growing[name].send()
        self._growing[LEDGER].send(size)
        with self._changed:
            self._done = max(self._done, asked)
            self._changed.notify_all()

    def _send_all(self) -> None:
        self._beat()
        if self.overtaken:
            return
        for growing in self._growing.values():
            growing.send()
        for name, state in self._files():
            if self._sent.get(name) != state:
                self._storage.write_bytes(name, (self._root / name).read_bytes())
                self._sent[name] = state
        for growing in self._growing.values():
            growing.tidy()
        self._remove()

    def _beat(self) -> None:
        """A sign of life; and a look whether somebody else has taken over, as after a long sleep."""
        if time.monotonic() - self._beaten < BEAT_S:
            return
        now = Session.read(self._storage)
        if now is not None and now.id != self.session.id:
            text = f"{now.user} on {now.host} has taken this search over: nothing more is sent to storage"
            self._tell(text)
            with self._changed:
                self.overtaken = True
                self._changed.notify_all()
            self.when_overtaken()
            return
        self.session.write(self._storage)
        self._beaten = time.monotonic()

    def _files(self) -> list[tuple[str, tuple[int, int]]]:
        """The whole files, with what tells their contents apart."""
        found = {
            path.name: path.stat()
            for pattern in WHOLE
            for path in self._root.glob(pattern)
            if path.is_file() and path.name not in (*GROWING, SESSION)
        }
        return [(name, (stat.st_mtime_ns, stat.st_size)) for name, stat in sorted(found.items())]

    def _remove(self) -> None:
        """Of many trials, as at the start of a resumed search, one listing says which have anything."""
        trials = self._storage.child("trials")
        with self._changed:
            batch = list(self._removals)
        present = {name.partition("/")[0] for name in trials.sizes(deep=True)} if len(batch) > 1 else None
        for number, but_logits in batch:
            trial = trials.child(f"{number:04d}")
            if present is not None and trial.name not in present:
                pass
            elif but_logits:
                for name in trial.names():
                    if name != LOGITS:
                        trial.remove(name)
            else:
                trial.clear()
            with self._changed:
                self._removals.remove((number, but_logits))

    def _later(self, number: int, but_logits: bool) -> None:
        with self._changed:
            self._removals.append((number, but_logits))

    def _lost(self, error: Exception) -> None:
        text = " ".join(str(error).split())
        if self._problem is None:
            self._tell(f"storage fails, the search goes on and sends what is missing later: {text}")
        with self._changed:
            self._problem = text
            self._changed.notify_all()

    def _found(self) -> None:
        with self._changed:
            before, self._problem = self._problem, None
        if before is not None:
            self._tell("storage is back, and has everything")

    def _tell(self, text: str) -> None:
        logger.warning("%s", text)
        self._say(text)

    def _missing(self) -> list[str]:
        missing = [name for name, growing in self._growing.items() if growing.missing]
        return missing + [name for name, state in self._files() if self._sent.get(name) != state]


# ------------------------------------------------------------------------------------ restoring


def bring_back(folder: RunFolder) -> None:
    """Before a search is resumed: let the run folder have what storage has, if another machine went on.

    Raises InputError while another process runs the search, and as `is_behind` does.
    """
    with _read_from(folder.storage):
        if folder.storage is not None:
            refuse_running(folder.storage)
        if is_behind(folder):
            assert folder.storage is not None
            fetch(folder.storage, folder.root)


def is_behind(folder: RunFolder) -> bool:
    """Whether another machine went on with the search, or began it. Only reads.

    Raises InputError when both went on without the other, or storage is not what the search has.
    """
    noted = _noted(folder.root)
    if folder.storage is None:
        if noted is not None:
            raise InputError(
                f"this search is kept in {noted['storage']} too",
                key="storage",
                allowed=f"the place without '/{folder.root.name}', as when the search was begun",
            )
        return False
    with _read_from(folder.storage):
        session = Session.read(folder.storage)
        if session is None or (noted is not None and noted["id"] == session.id):
            return False
        return not folder.root.exists() or _lacks_some(folder)


@contextlib.contextmanager
def _read_from(storage: Folder | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"can't be read from {storage}: {error}", key="storage") from error


def fetch(storage: Folder, root: Path) -> None:
    """Make `root` from what storage has of a search; a folder there is replaced. All or nothing.

    Nothing is made of a search that ended before its space was stored.
    """
    new = root.with_name(f".{root.name}.restoring")
    old = root.with_name(f".{root.name}.replaced")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    names = storage.sizes()
    if "space.yaml" not in names:
        return
    new.mkdir(parents=True)
    for name in GROWING:
        content = patiently(read_parts, storage.child(f"{name}.parts"))
        if content:
            (new / name).write_bytes(content)
    for name in names:
        if name != SESSION and any(Path(name).match(pattern) for pattern in WHOLE):
            patiently(storage.download, name, new / name)
    for name in ("model", "controls"):
        fetch_folder(storage, name, new)
    _fetch_winners_logits(storage, new)
    if (session := Session.read(storage)) is not None:
        _note(new, session, storage)
    if root.exists():
        root.rename(old)
    new.rename(root)
    shutil.rmtree(old, ignore_errors=True)


def fetch_folder(storage: Folder, name: str, root: Path) -> None:
    """Copy a folder of a search from storage, if it is there."""
    found = storage.child(name)
    for part in found.sizes(deep=True):
        patiently(found.download, part, root / name / part)


def _fetch_winners_logits(storage: Folder, root: Path) -> None:
    try:
        winner = int(json.loads((root / "summary.json").read_text("utf-8"))["winner"]["trial"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    RunFolder(root, storage).fetch_logits(winner)


def _lacks_some(folder: RunFolder) -> bool:
    """Whether storage has all that this machine knows, and may have more."""
    assert folder.storage is not None
    if not folder.ledger.exists():
        return True
    here = folder.ledger.read_bytes()
    here = _masked(here[: here.rfind(b"\n") + 1])
    there = read_parts(folder.storage.child(f"{LEDGER}.parts"))
    if here.startswith(there):
        return False
    if there.startswith(here):
        return True
    raise InputError(
        f"the search went on in {folder.root} and in {folder.storage}, each without the other",
        key="storage",
        allowed=f"to go on from storage, move {folder.root} away; or another name",
    )


def _note(root: Path, session: Session, storage: Folder) -> None:
    text = json.dumps({"id": session.id, "storage": str(storage)})
    (root / OWN).write_text(text, encoding="utf-8")


def _noted(root: Path) -> dict[str, Any] | None:
    try:
        noted = json.loads((root / OWN).read_text("utf-8"))
        return {"id": str(noted["id"]), "storage": str(noted["storage"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
