"""Where tracking goes: the address, checked before a search starts and without importing mlflow."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from hiertune._programs import as_typed
from hiertune._text import without_password
from hiertune.errors import InputError

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


def resolve_uri(uri: str | None, runs_dir: Path) -> str:
    """The tracking URI to use: the one given, else MLFLOW_TRACKING_URI, else SQLite in `runs_dir`.

    A relative SQLite path becomes absolute.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(runs_dir).resolve()}/mlflow.db"
    database = sqlite_file(uri)
    return uri if database is None else f"{uri.partition(':')[0]}:///{database}"


def check_uri(uri: str) -> None:
    """Raise InputError for an address that MLflow 3 could never use. It need not be up."""
    try:
        parts = urlsplit(uri)
        _ = parts.port
    except ValueError:  # not shown: where a password ends can't be told
        allowed = "http://HOST:PORT; in a password '/', '@' and '[' are %2F, %40 and %5B"
        raise InputError("is not an address", key="tracking.uri", allowed=allowed) from None
    database = sqlite_file(uri)
    if uri == "databricks" or parts.scheme in ("databricks", *_plugins()):
        return
    if parts.scheme in ("", "file"):
        instead = f"sqlite:///{Path('mlflow.db').resolve()} (`mlflow migrate-filestore` moves old runs there)"
        raise _refusal(uri, "MLflow 3 no longer tracks into folders", instead)
    if database is not None:
        _check_sqlite(uri, database)
    elif parts.scheme.partition("+")[0] in DATABASES:
        _check_database(uri)
    elif parts.scheme not in ("http", "https"):
        allowed = "http, https, sqlite, postgresql, mysql, mssql"
        raise _refusal(uri, f"MLflow knows no {parts.scheme!r} addresses", allowed)
    elif not parts.hostname:
        raise _refusal(uri, "has no host", "http://HOST:PORT")


def ui_command(uri: str) -> str | None:
    """What to type to see the runs of a database; None for a server, which is there already."""
    if urlsplit(uri).scheme in ("http", "https"):
        return None
    return f"{as_typed('mlflow')} ui --backend-store-uri {shlex.quote(display_uri(uri))}"


def runs_page(uri: str) -> str:
    """The page of the runs: of the server, or of `ui_command` for a database.

    Without its last part MLflow 3 opens on the traces of language models.
    """
    server = display_uri(uri) if urlsplit(uri).scheme in ("http", "https") else "http://127.0.0.1:5000"
    return f"{server.rstrip('/')}/#/experiments?workflowType=machine_learning"


def display_uri(uri: str) -> str:
    """`uri` with `***` for its passwords."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        return "***"  # whatever it is, it may hold one
    if parts.password is not None:
        login, _, host = parts.netloc.rpartition("@")
        uri = urlunsplit(parts._replace(netloc=f"{login.partition(':')[0]}:***@{host}"))
    else:
        uri = without_password(uri)
    return re.sub(r"(?i)([?&][^=&]*(?:password|passwd|token|secret)[^=&]*=)[^&#]+", r"\1***", uri)


def sqlite_file(uri: str) -> Path | None:
    """The absolute path of a SQLite address; None for every other address."""
    match = re.fullmatch(r"sqlite(?:\+\w+)?:///(.+)", uri)
    return None if match is None or match[1] == ":memory:" else Path(match[1]).absolute()


def artifact_location(uri: str, runs_dir: Path) -> str | None:
    """Where a new experiment keeps files: beside a database; a server knows its own place (None)."""
    if urlsplit(uri).scheme.partition("+")[0] not in DATABASES:
        return None
    database = sqlite_file(uri)
    return ((runs_dir if database is None else database.parent) / "mlartifacts").as_uri()


def _check_sqlite(uri: str, database: Path) -> None:
    if any(mark in str(database) for mark in "?#%"):
        raise _refusal(uri, "a path with '?', '#' or '%' is not understood", "sqlite:////folder/mlflow.db")
    if database.is_dir() or not database.parent.is_dir():
        raise _refusal(uri, f"{database} can't be a file", "sqlite:////an/existing/folder/mlflow.db")
    if database.exists() and database.stat().st_size:
        with database.open("rb") as file:
            if file.read(16) != b"SQLite format 3\0":
                raise _refusal(uri, f"{database} is not an SQLite database", "sqlite:////folder/mlflow.db")


def _check_database(uri: str) -> None:
    import sqlalchemy

    if uri.startswith("sqlite"):
        raise _refusal(uri, "names no file that other programs could open", "sqlite:////folder/mlflow.db")
    try:
        sqlalchemy.make_url(uri).get_dialect().import_dbapi()
    except sqlalchemy.exc.ArgumentError as error:
        raise _refusal(uri, str(error), "DATABASE://USER:PASSWORD@HOST:PORT/NAME") from None
    except ImportError as error:
        raise _refusal(
            uri, f"its driver is missing ({error})", "an address whose driver is installed"
        ) from None


def _plugins() -> list[str]:
    return [point.name for point in importlib.metadata.entry_points(group="mlflow.tracking_store")]


def _refusal(uri: str, problem: str, allowed: str) -> InputError:
    return InputError(f"{display_uri(uri)!r}: {problem}", key="tracking.uri", allowed=allowed)
