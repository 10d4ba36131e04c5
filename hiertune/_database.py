"""Where a ledger is: a journal in the run folder, or a database, whose password no file may hold."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiertune._files import replace_file
from hiertune.errors import InputError

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

VARIABLE = "HIERTUNE_LEDGER"
CONNECT_SECONDS = 5
"""How long a database may take to answer a new connection."""
ANSWER_SECONDS = 15
"""How long it may be silent while it owes an answer: one that hangs is as good as gone."""

_SECRETS = ("password", "passwd", "pwd", "passphrase", "sslpassword")
_FORM = "DATABASE+DRIVER://USER@HOST:PORT/NAME, such as postgresql+psycopg://me@localhost/searches"
_INSTEAD = f"an address without it; PGPASSWORD, ~/.pgpass or {VARIABLE} may hold one"
_MYSQL = {
    "connect_timeout": CONNECT_SECONDS,
    "read_timeout": ANSWER_SECONDS,
    "write_timeout": ANSWER_SECONDS,
}
_LIMITS: dict[str, dict[str, int]] = {
    "psycopg": {"connect_timeout": CONNECT_SECONDS},  # the rest is `hiertune._postgresql`'s
    "psycopg2": {  # a network that is gone; of a server that hangs it can't be told
        "connect_timeout": CONNECT_SECONDS,
        "tcp_user_timeout": ANSWER_SECONDS * 1000,
        "keepalives_idle": ANSWER_SECONDS // 3,
        "keepalives_interval": ANSWER_SECONDS // 3,
        "keepalives_count": 2,
    },
    "mysqldb": _MYSQL,
    "pymysql": _MYSQL,
    "pg8000": {"timeout": ANSWER_SECONDS},  # of its socket
    "pysqlite": {"timeout": CONNECT_SECONDS},  # for another process' lock
}
"""Arguments of each driver's `connect`."""


def ledger_url(setting: str | None) -> str | None:
    """The database that `ledger:` names, else the one of HIERTUNE_LEDGER; None for a journal file.

    InputError for what is no address, for a password in `setting`, and for a driver that is missing.
    """
    text, key = (setting, "ledger") if setting else (os.environ.get(VARIABLE), VARIABLE)
    if not text:
        return None
    url = _parsed(text, key)
    if key == "ledger" and (url.password is not None or _secrets(url)):
        problem = f"{display_ledger(text)!r} holds a password: a space file is shown and copied"
        raise InputError(problem, key=key, allowed=_INSTEAD)
    try:
        url.get_dialect().import_dbapi()
    except ImportError as error:
        problem = f"{display_ledger(text)!r}: its driver is missing ({error})"
        raise InputError(problem, key=key, allowed=_driver_hint(url)) from None
    except Exception as error:  # noqa: BLE001  a dialect that SQLAlchemy doesn't know, or that is broken
        problem = f"{display_ledger(text)!r}: {error}"
        raise InputError(problem, key=key, allowed=_FORM) from None
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        problem = f"{display_ledger(text)!r} names no file"
        raise InputError(problem, key=key, allowed="sqlite:////folder/ledger.db")
    return text


def display_ledger(url: str) -> str:
    """`url` without its password, for messages, logs and files."""
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = _parse(url)
    except (ArgumentError, ValueError):
        return "***"  # whatever it is, it may hold one
    parsed = parsed.update_query_dict(dict.fromkeys(_secrets(parsed), "***"))
    return parsed.render_as_string(hide_password=True)


def engine_arguments(url: str) -> dict[str, Any]:
    """Arguments for SQLAlchemy's `create_engine`: don't wait for ever, and mend a connection that was lost.

    What the address itself says comes first.
    """
    parsed = _parse(url)
    driver = parsed.get_dialect().driver
    limits = {name: limit for name, limit in _LIMITS.get(driver, {}).items() if name not in parsed.query}
    if driver != "psycopg":
        return {"pool_pre_ping": True, "connect_args": limits}
    from hiertune._postgresql import connect

    return {"pool_pre_ping": True, "creator": functools.partial(connect, parsed, limits)}


def check_reachable(url: str, *, new: bool = True) -> None:
    """InputError unless the database answers, and has a ledger in it or may be `new`. Makes nothing."""
    import sqlalchemy

    parsed = _parse(url)
    is_file = parsed.get_backend_name() == "sqlite" and "uri" not in parsed.query
    if is_file and not (file := Path(parsed.database or "").absolute()).exists():
        if not (new and file.parent.is_dir() and os.access(file.parent, os.W_OK | os.X_OK)):
            raise unreachable(url, FileNotFoundError("unable to open database file"))
        return
    engine = sqlalchemy.create_engine(parsed, **engine_arguments(url))
    try:
        with engine.connect() as connection:
            if not new and not sqlalchemy.inspect(connection).has_table("studies"):  # Optuna's
                allowed = "the database that the search was begun with"
                raise InputError(f"{display_ledger(url)!r} holds no searches", key="ledger", allowed=allowed)
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise unreachable(url, error) from None
    finally:
        engine.dispose()


def unreachable(url: str, error: Exception) -> InputError:
    """What to say when a database does not answer; the driver's words, without the password."""
    cause = _cause(error)
    words = " ".join(str(cause).split())
    password = _parse(url).password
    if password:
        words = words.replace(password, "***")
    problem = f"{display_ledger(url)!r} can't be used: {words[:300] or type(cause).__name__}"
    return InputError(problem, key="ledger", allowed="a database that is up, and that this user may write to")


def _cause(error: Exception) -> BaseException:
    """The driver's own error, if SQLAlchemy, or Optuna, stumbled over one."""
    each: BaseException | None = error
    while each is not None:
        if orig := getattr(each, "orig", None):
            return orig
        each = each.__cause__ or each.__context__
    return error.__cause__ or error


def _parse(text: str) -> URL:
    from sqlalchemy.engine import make_url

    return make_url(text)


def _parsed(text: str, key: str) -> URL:
    from sqlalchemy.exc import ArgumentError

    try:
        return _parse(text)
    except (ArgumentError, ValueError):  # their messages quote the text, which may hold a password
        raise InputError("is not the address of a database", key=key, allowed=_FORM) from None


def _secrets(url: URL) -> list[str]:
    return [name for name in url.query if name.lower() in _SECRETS]


def _driver_hint(url: URL) -> str:
    if url.get_backend_name() == "postgresql":
        return "postgresql+psycopg://..., after `pip install 'hiertune[postgresql]'`"
    return "an address whose driver is installed"


@dataclass(frozen=True)
class Place:
    """Where the ledger of a run folder is: its journal, or a database."""

    journal: Path
    """The file, if it is no database."""
    url: str | None = field(default=None, repr=False)
    """Of a database; may hold a password."""

    @property
    def pointer(self) -> Path:
        """File that says which search of a database is this folder's."""
        return self.journal.with_suffix(".json")

    def __str__(self) -> str:
        return str(self.journal) if self.url is None else display_ledger(self.url)

    @property
    def uid(self) -> str | None:
        """Of the search that the pointer names."""
        return None if (pointer := _read_pointer(self.pointer)) is None else pointer["uid"]

    def point(self, uid: str) -> None:
        """Write the pointer, once the search is in the database."""
        assert self.url is not None
        text = json.dumps({"ledger": display_ledger(self.url), "uid": uid}, indent=2)
        replace_file(self.pointer, text + "\n")


def place_of(journal: Path, url: str | None, *, given: bool = False) -> Place:
    """The ledger of a run folder that is there. `url` is the database that is set, if any.

    A folder with a journal keeps to it; one that was begun on a database needs its address.

    Args:
        given: `url` stands in the space file, not in the environment: then it must not differ.
    """
    place = Place(journal, url)
    if journal.exists():
        if url is not None and given:
            raise InputError(
                f"{display_ledger(url)!r} is not the ledger of this search: that is {place.journal}",
                key="ledger",
                allowed="the setting that it was begun with, or another name",
            )
        return Place(journal)
    if url is None and place.pointer.exists():
        pointer = _read_pointer(place.pointer)
        where = f"the database {pointer['ledger']}" if pointer else "a database"
        raise InputError(
            f"the ledger of this search is {where}",
            file=place.pointer,
            allowed="its address as `ledger:` in the space file, or in HIERTUNE_LEDGER",
        )
    return place


def _read_pointer(path: Path) -> dict[str, str] | None:
    try:
        text = path.read_text("utf-8")
        if not text.strip("\0"):
            return None  # what a loss of power leaves of a file that was not written to the disk
        pointer = json.loads(text)
        return {key: str(pointer[key]) for key in ("ledger", "uid")}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"is damaged ({type(error).__name__})", file=path) from None
