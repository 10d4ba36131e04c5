"""The database of a ledger: its address, without a password in the space file, and whether it answers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from hiertune.errors import InputError

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

VARIABLE = "HIERTUNE_LEDGER"
CONNECT_SECONDS = 5
"""How long a database may take to answer a new connection."""

_SECRETS = ("password", "passwd", "pwd", "passphrase", "sslpassword")
_FORM = "DATABASE+DRIVER://USER@HOST:PORT/NAME, such as postgresql+psycopg://me@localhost/searches"
_INSTEAD = f"an address without it; PGPASSWORD, ~/.pgpass or {VARIABLE} may hold one"
_TIMEOUTS = {
    "psycopg": "connect_timeout",
    "psycopg2": "connect_timeout",
    "mysqldb": "connect_timeout",
    "pymysql": "connect_timeout",
    "pg8000": "timeout",
    "pysqlite": "timeout",
}


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


def connect_arguments(url: str) -> dict[str, Any]:
    """Arguments for SQLAlchemy's `create_engine`: give up soon, and mend a connection that was lost."""
    timeout = _TIMEOUTS.get(_parse(url).get_dialect().driver)
    return {
        "pool_pre_ping": True,
        "connect_args": {timeout: CONNECT_SECONDS} if timeout else {},
    }


def check_reachable(url: str) -> None:
    """InputError unless the database answers."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(_parse(url), **connect_arguments(url))
    try:
        with engine.connect():
            pass
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise unreachable(url, error) from None
    finally:
        engine.dispose()


def unreachable(url: str, error: Exception) -> InputError:
    """What to say when a database does not answer; the driver's words, without the password."""
    cause = getattr(error, "orig", None) or error.__cause__ or error
    words = " ".join(str(getattr(cause, "orig", None) or cause).split())
    password = _parse(url).password
    if password:
        words = words.replace(password, "***")
    problem = f"{display_ledger(url)!r} can't be used: {words[:300] or type(cause).__name__}"
    return InputError(problem, key="ledger", allowed="a database that is up, and that this user may write to")


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
