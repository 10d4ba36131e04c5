"""What a search talks to: Ray, MLflow, the database of its ledger, its storage."""

from __future__ import annotations

import base64
import http.client
import re
import shlex
import socket
import stat
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from hiertune._database import display_ledger, engine_arguments
from hiertune.doctor.finding import Case, Finding, ok, probe, problem, warning
from hiertune.errors import InputError
from hiertune.storage import check_address, shown_address
from hiertune.tracking import check_uri, display_uri, resolve_uri

SERVER_SECONDS = 4.0
"""How long a server may take to answer."""
RAY_SECONDS = 60.0
"""How long Ray may take to start, or a cluster to be joined."""


# ----------------------------------------------------------------------------------------- Ray


def check_token(case: Case) -> Iterator[Finding]:
    """Ray's token authentication: mode, token, and who can read it."""
    mode = case.environment.get("RAY_AUTH_MODE", "").lower()
    if mode not in ("", "token", "disabled"):
        yield problem("ray token", f"RAY_AUTH_MODE={mode}", "Ray knows no such mode", "unset RAY_AUTH_MODE")
        return
    if mode == "disabled":
        why = "whoever reaches Ray's ports can run code as you, on this machine as well"
        yield warning("ray token", "RAY_AUTH_MODE=disabled", why, "unset RAY_AUTH_MODE")
        return
    if case.environment.get("RAY_AUTH_TOKEN"):
        yield ok("ray token", "from RAY_AUTH_TOKEN")
        return
    given = case.environment.get("RAY_AUTH_TOKEN_PATH")
    home = case.environment.get("HOME")
    yield _token_file(
        Path(given) if given else Path(home or Path.home()) / ".ray" / "auth_token",
        needed=bool(given) or (case.cluster is not None and mode == "token"),
    )


def _token_file(path: Path, needed: bool) -> Finding:
    name = "ray token"
    try:
        mode = path.stat().st_mode
        text = path.read_text("utf-8").strip()
    except FileNotFoundError:
        if not needed:
            return ok(name, f"made in {path} when Ray first starts here")
        advice = "copy the token of the cluster there (`ray get-auth-token` on its head), mode 600"
        return problem(
            name, f"{path} does not exist", "Ray is told to authenticate by the token in it", advice
        )
    except (OSError, UnicodeDecodeError) as error:
        why = "Ray can neither be started nor joined without its token"
        said = error.strerror if isinstance(error, OSError) else "is not text"
        return problem(name, f"{path} can't be read: {said}", why, "let it be a file of your own, mode 600")
    if not text:
        why = "Ray can neither be started nor joined with an empty token"
        return problem(name, f"{path} is empty", why, f"remove {path}; Ray makes a new one")
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        why = "whoever can read it can run code in your searches"
        return warning(name, f"{path} can be read by others", why, f"chmod 600 {shlex.quote(str(path))}")
    return ok(name, f"{path}, readable by you alone")


def check_gloo_interface(case: Case) -> Iterator[Finding]:
    """Which address workers on other nodes would be told."""
    interface = case.environment.get("GLOO_SOCKET_IFNAME")
    names = {name for _, name in socket.if_nameindex()}
    if interface and not set(interface.split(",")) <= names:
        why = "gloo, which workers on CPUs talk through, finds no such interface"
        yield problem(
            "interface", f"GLOO_SOCKET_IFNAME={interface}", why, f"one of {', '.join(sorted(names))}"
        )
        return
    host = socket.gethostname()
    try:
        addresses = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, None)})
    except OSError as error:
        why = "gloo looks the host name up to find the address to listen at"
        advice = f"add `127.0.0.1 {host}` to /etc/hosts, or set GLOO_SOCKET_IFNAME"
        yield problem("interface", f"the host name {host} is not known: {error.strerror}", why, advice)
        return
    if interface:
        yield ok("interface", f"GLOO_SOCKET_IFNAME={interface}")
    elif case.cluster is not None and all(_is_loopback(address) for address in addresses):
        what = f"the host name {host} is {', '.join(addresses)}, which other nodes can't reach"
        why = "workers of one trial on several nodes would never find each other"
        advice = f"set GLOO_SOCKET_IFNAME to the interface between the nodes ({', '.join(sorted(names))})"
        yield problem("interface", what, why, advice)
    else:
        yield ok("interface", f"{host} is {', '.join(addresses)}")


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def check_gloo(case: Case) -> Iterator[Finding]:
    yield from probe("torch", {}, 40.0, "gloo")


def check_ray(case: Case) -> Iterator[Finding]:
    """Joins the cluster, if there is one; else starts Ray only where it is asked to."""
    if case.cluster is None and not case.start_ray:
        yield ok("ray", "starts on this machine, on loopback alone (--start-ray tries it)")
        return
    if case.cluster is None:
        why, advice = "every search runs in Ray", "see the logs under /tmp/ray/session_latest/logs"
        late = problem("ray", f"does not start within {RAY_SECONDS:g} s", why, advice)
    else:
        why = "the search is to run in the cluster that RAY_ADDRESS names, and would wait for it"
        advice = (
            "see that it runs (`ray status` on its head) and that its port can be reached from here; or "
            "correct RAY_ADDRESS; or unset it, to start Ray on this machine"
        )
        if (said := _no_listener(case.cluster)) is not None:
            yield problem("ray", f"nothing answers at {case.cluster}: {said}", why, advice)
            return
        late = problem("ray", f"{case.cluster} gives no answer within {RAY_SECONDS:g} s", why, advice)
    yield from probe("ray", {"runs": str(case.runs)}, RAY_SECONDS, "ray", late)


def _no_listener(address: str) -> str | None:
    """Why nothing can be reached at HOST:PORT; None if something can, or the address is of another form."""
    host, _, port = address.rpartition(":")
    if "/" in address or not port.isdecimal():
        return None
    try:
        socket.create_connection((host.strip("[]"), int(port)), SERVER_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        return str(getattr(error, "strerror", None) or error)
    return None


# -------------------------------------------------------------------------------------- MLflow


def check_mlflow(case: Case) -> Iterator[Finding]:
    given = None if case.config is None else case.config.tracking.uri
    uri = resolve_uri(given, case.runs)
    try:
        if uri != f"sqlite:///{case.runs.resolve()}/mlflow.db":
            check_uri(uri)
    except InputError as error:
        yield problem(
            "mlflow", str(error.problem), "nothing could be tracked", error.allowed or "another address"
        )
        return
    if given and urlsplit(given).password:
        why = "whoever gets the space file gets the password"
        advice = "keep it in MLFLOW_TRACKING_URI, or in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        yield warning("mlflow", "the password of tracking.uri stands in the space file", why, advice)
    if urlsplit(uri).scheme in ("http", "https"):
        yield _server(uri, case.environment)
    elif uri.startswith("sqlite"):
        yield ok("mlflow", display_uri(uri))
    elif uri == "databricks" or urlsplit(uri).scheme == "databricks":
        yield ok("mlflow", "databricks; not tried")
    else:
        yield _database("mlflow", uri)


def _server(uri: str, environment: Mapping[str, str]) -> Finding:
    """Health, version and login of an MLflow server."""
    shown, why = display_uri(uri), "training goes on without it, but its points are delivered only later"
    try:
        _get(uri, "/health", environment)
        version = _get(uri, "/version", environment).strip()
        _get(uri, "/api/2.0/mlflow/experiments/search?max_results=1", environment)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            advice = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            return problem("mlflow", f"{shown} refuses the login ({error.code})", why, advice)
        advice = "look at the server's log; is it an MLflow server?"
        return warning("mlflow", f"{shown} answers {error.code}", why, advice)
    except TimeoutError:
        what = f"{shown} takes more than {SERVER_SECONDS:g} s to answer"
        return warning("mlflow", what, why, "look at the server's load and log")
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            what = f"{shown} takes more than {SERVER_SECONDS:g} s to answer"
            return warning("mlflow", what, why, "look at the server's load and log")
        return warning(
            "mlflow", f"{shown} can't be reached: {reason}", why, "start it, or correct tracking.uri"
        )
    if not re.fullmatch(r"\d+\.\d+\S*", version):
        return warning("mlflow", f"{shown} does not say its version", why, "is it an MLflow server?")
    if int(version.partition(".")[0]) < 3:
        why = "hiertune's client is MLflow 3; older servers lack what it asks for"
        return warning("mlflow", f"{shown} is MLflow {version}", why, "update the server to MLflow 3")
    return ok("mlflow", f"{shown}, MLflow {version}")


def _get(uri: str, path: str, environment: Mapping[str, str]) -> str:
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    request = urllib.request.Request(urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", "")) + path)
    user, password = parts.username, parts.password
    if user is None and "MLFLOW_TRACKING_USERNAME" in environment:
        user, password = environment["MLFLOW_TRACKING_USERNAME"], environment.get("MLFLOW_TRACKING_PASSWORD")
    if user is not None:
        login = f"{unquote(user)}:{unquote(password or '')}".encode()
        request.add_header("Authorization", f"Basic {base64.b64encode(login).decode()}")
    elif token := environment.get("MLFLOW_TRACKING_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    # the address is http or https: its scheme was looked at before
    with urllib.request.urlopen(request, timeout=SERVER_SECONDS) as answer:  # nosec B310 - http(s), see above
        return answer.read(1 << 16).decode("utf-8", "replace")


# -------------------------------------------------------------------------- ledger and storage


def check_ledger(case: Case) -> Iterator[Finding]:
    given = None if case.config is None else case.config.ledger
    uri = given or case.environment.get("HIERTUNE_LEDGER")
    if not uri:
        yield ok("ledger", "a journal file in the run folder")
    elif given and urlsplit(given).password:
        why = "whoever gets the space file gets the password"
        yield problem("ledger", "the password stands in the space file", why, "PGPASSWORD, or ~/.pgpass")
    else:
        yield _database("ledger", uri)


def _database(check: str, uri: str) -> Finding:
    import sqlalchemy

    why, shown = "a search keeps its record there", display_ledger(uri)
    advice = "correct the address, start the database, or set its password in the environment"
    try:
        url = sqlalchemy.make_url(uri)
    except (sqlalchemy.exc.ArgumentError, ValueError):  # not shown: it may hold a password
        return problem(
            check, "is not the address of a database", why, "DATABASE+DRIVER://USER@HOST:PORT/NAME"
        )
    try:
        lite = url.get_backend_name() == "sqlite"
        if lite and url.database and not Path(url.database).exists():
            # connecting would make the file
            return ok(check, f"{shown}, made when it is first used")
        engine = sqlalchemy.create_engine(url, **engine_arguments(uri), poolclass=sqlalchemy.pool.NullPool)
        with engine.connect() as connection:
            # "select 1" would not make SQLite look at the file
            connection.execute(sqlalchemy.text("select 1 from sqlite_master" if lite else "select 1"))
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, UnicodeError) as error:
        cause = getattr(error, "orig", None) or error
        said = without_secret(str(cause).strip().splitlines()[0] if str(cause).strip() else str(cause), uri)
        return problem(check, f"{shown} can't be used: {said}", why, advice)
    return ok(check, shown)


def check_storage(case: Case) -> Iterator[Finding]:
    """Looks at the folder; writes nothing to it unless it is on this machine (see `writable`)."""
    given = None if case.config is None else case.config.storage
    uri = given or case.environment.get("HIERTUNE_STORAGE")
    if not uri:
        yield ok("storage", "the run folder")
        return
    from hiertune.doctor.files import writable

    if "://" not in uri:
        start = case.space.parent if given and case.space else Path()  # a path starts where its file is
        yield writable("storage", start / Path(uri).expanduser())
        return
    try:
        check_address(uri)
    except InputError as error:
        why = "checkpoints, outputs and the model are to be kept there"
        yield problem("storage", error.problem, why, error.allowed or "another address")
        return
    from pyarrow import fs

    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
        if isinstance(filesystem, fs.LocalFileSystem):
            yield writable("storage", Path(path))
            return
        bucket = path.split("/")[0]
        found = filesystem.get_file_info([path, bucket])
    except (OSError, ValueError, ImportError, NotImplementedError) as error:  # pyarrow's are among these
        yield _no_storage(uri, without_secret(" ".join(str(error).split()), uri))
        return
    if all(info.type == fs.FileType.NotFound for info in found):
        yield _no_storage(uri, f"there is no {bucket!r}")
    else:
        yield ok("storage", f"{shown_address(uri)} can be read; writing was not tried")


def _no_storage(uri: str, said: str) -> Finding:
    why = "checkpoints, outputs and the model are to be kept there"
    advice = "correct the address, make the bucket, or set the credentials in the environment"
    return problem("storage", f"{shown_address(uri)}: {said}", why, advice)


def without_secret(text: str, uri: str) -> str:
    """`text` without the password of `uri`, raw or quoted."""
    secret = urlsplit(uri).password
    for form in filter(None, (secret, unquote(secret) if secret else None)):
        text = text.replace(form, "***")
    return text
