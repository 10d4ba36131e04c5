"""One process at a time goes on with a search: a lock on its folder, and for a database a session in it.

The lock is the operating system's and goes with the process, whatever ends it. A database is open to
machines that do not share the folder, so there the process that writes says so in the search's study, and
that it is alive, every few seconds. A session whose process is gone, or which has been silent for long
enough, is taken over; whoever finds its own session taken over writes nothing more.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from dataclasses import asdict, dataclass, replace
from datetime import datetime

import filelock
from optuna.storages import RDBStorage

from hiertune import _process
from hiertune.errors import InputError
from hiertune.search.ledger import Ledger
from hiertune.search.outputs import RunFolder

logger = logging.getLogger(__name__)

SESSION = "session"
"""Attribute of the first revision's study: the process that writes, or null. Replaced in one statement that
names what was there."""
BEAT_S = 5.0
SILENT_S = 30.0
"""A session that has not told for so long that it is alive is over."""
_LOOK_S = 0.5
LONG_SILENT_S = 600.0
"""After so long not even clocks that differ can make a session look dead that is not."""


@dataclass(frozen=True, kw_only=True)
class Process(_process.Process):
    """Who goes on with a search."""

    id: str
    started: float
    """Of the session; seconds since 1970."""
    beat: float
    """When it last told that it is alive."""

    @classmethod
    def new(cls) -> Process:
        now = time.time()
        return cls.this(id=uuid.uuid4().hex, started=now, beat=now)

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.started).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
        return f"process {self.pid} on {self.host}, since {since}"

    @property
    def is_over(self) -> bool:
        """Certainly: a process of this machine that has ended, or one that is silent since long ago."""
        return self.lives is False or time.time() - self.beat > LONG_SILENT_S


class FolderLock:
    """The lock on a run folder; a context manager. InputError, naming who runs it, where it is taken."""

    def __init__(self, folder: RunFolder) -> None:
        self._lock = filelock.FileLock(folder.lock, timeout=0)
        self._holder = folder.owner
        self._request = folder.request
        self._root = folder.root

    def __enter__(self) -> FolderLock:
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise in_use(str(self._root), self._read()) from None
        except OSError as error:
            raise InputError(f"can't be locked: {error.strerror}", file=self._root) from None
        # One from before is not for this process. From here on one is, however long the ledger takes to open.
        self._request.unlink(missing_ok=True)
        self._holder.write_text(json.dumps(asdict(Process.new())) + "\n", encoding="utf-8")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._holder.unlink(missing_ok=True)
        self._lock.release()

    def _read(self) -> Process | None:
        try:
            return Process(**json.loads(self._holder.read_text("utf-8")))
        except (OSError, ValueError, TypeError):  # it has the lock, but has not yet said who it is
            return None


class Ownership:
    """This process' right to write a ledger, from entering to leaving.

    Raises InputError on entering where another process has it.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._me = Process.new()
        self._text = ""
        self._told = 0.0
        self._telling = threading.Lock()
        self._ended = threading.Event()
        self._beating: threading.Thread | None = None

    def __enter__(self) -> Ownership:
        if isinstance(self._ledger.storage, RDBStorage):
            self._take(self._ledger.storage)
            self._ledger.refresh()  # it may have been written to until now
            self._ledger.confirm = self._confirm
            self._beating = threading.Thread(target=self._beat, name="ledger-session", daemon=True)
            self._beating.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        if self._beating is not None:
            self._beating.join()
        if self._ledger.lost is None and self._beating is not None:
            from sqlalchemy.exc import SQLAlchemyError

            assert isinstance(self._ledger.storage, RDBStorage)
            try:
                self._replace(self._ledger.storage, self._text, "null")
            except SQLAlchemyError as error:  # whoever comes next finds the process gone, or silent
                logger.warning("the ledger %s is away: %s", self._ledger.place, str(error).splitlines()[0])

    # ------------------------------------------------------------------------------ in a database

    def _take(self, storage: RDBStorage) -> None:
        deadline, seen = time.monotonic() + SILENT_S, None
        while True:
            text = self._read(storage)
            holder = _holder(text)
            if holder is not None and (holder.lives or (seen is not None and text != seen)):
                raise in_use(str(self._ledger.place), holder)
            if holder is None or holder.is_over or time.monotonic() > deadline:
                mine = json.dumps(asdict(self._me))
                if self._replace(storage, text, mine):
                    self._text, self._told = mine, time.time()
                    return
                continue  # somebody was faster
            if seen is None:
                logger.info("waiting up to %d s whether %s is alive", SILENT_S, holder)
            seen = text
            time.sleep(_LOOK_S)

    def _beat(self) -> None:
        from sqlalchemy.exc import SQLAlchemyError

        while self._ledger.lost is None and not self._ended.wait(BEAT_S):
            try:
                self._tell()
            except SQLAlchemyError as error:  # it may come back, and the next write says if it does not
                logger.warning("the ledger %s is away: %s", self._ledger.place, str(error).splitlines()[0])

    def _confirm(self) -> None:
        """Before a write: who was silent for long, as on a machine that slept, may have been taken over."""
        if abs(time.time() - self._told) > SILENT_S / 2:
            self._tell()

    def _tell(self) -> None:
        """Tell that this process is alive, or find out that another one has taken over."""
        storage = self._ledger.storage
        assert isinstance(storage, RDBStorage)
        with self._telling:
            now = time.time()
            text = json.dumps(asdict(replace(self._me, beat=now)))
            if self._replace(storage, self._text, text):
                self._text, self._told = text, now
                return
            holder = _holder(found := self._read(storage))
            if holder is not None and holder.id == self._me.id:  # it was told, but the answer was lost
                self._text = found
            else:
                self._ledger.lose(f"another process took it over: {holder or 'one that has ended'}")

    def _read(self, storage: RDBStorage) -> str:
        from optuna.storages._rdb.models import StudyUserAttributeModel as Attribute
        from sqlalchemy import select

        query = select(Attribute.value_json).where(
            Attribute.study_id == self._ledger.first_id, Attribute.key == SESSION
        )
        with storage.engine.connect() as connection:
            found = connection.execute(query).scalar()
        if found is None:
            storage.set_study_user_attr(self._ledger.first_id, SESSION, None)
            return "null"
        return str(found)

    def _replace(self, storage: RDBStorage, old: str, new: str) -> bool:
        """Whether the attribute was still `old`, and is now `new`."""
        from optuna.storages._rdb.models import StudyUserAttributeModel as Attribute
        from sqlalchemy import update

        statement = (
            update(Attribute)
            .where(
                Attribute.study_id == self._ledger.first_id,
                Attribute.key == SESSION,
                Attribute.value_json == old,
            )
            .values(value_json=new)
        )
        with storage.engine.begin() as connection:
            return connection.execute(statement).rowcount == 1


def in_use(where: str, holder: Process | None) -> InputError:
    who = "another process" if holder is None else str(holder)
    return InputError(
        f"{where}: this search is being run by {who}",
        allowed="one process at a time: wait for its end, stop it, or search under another name",
    )


def _holder(text: str) -> Process | None:
    found = json.loads(text)
    return None if found is None else Process(**found)
