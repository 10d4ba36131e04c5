"""Folders that may lie anywhere: on this disk, or where pyarrow's filesystems reach.

    s3://bucket/folder?region=eu-west-1     gs://bucket/folder     abfs://container@account.dfs.core.windows.net/folder
    hdfs://host:port/folder                 file:///folder         /folder

Credentials come from the environment (for S3 the AWS variables, profiles and roles) and never stand in an
address, so that an address can be shown, logged and sent to workers. pyarrow is imported when a folder that
is not on this disk is opened.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import os
import shutil
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from hiertune._files import sync
from hiertune._text import without_password
from hiertune.errors import InputError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

ALLOWED = "a path, or s3://, gs://, abfs://, hdfs:// or file:// with a folder"
_OPTIONS = {
    "s3": ("region", "scheme", "endpoint_override", "force_virtual_addressing", "tls_ca_file_path"),
    "gs": ("scheme", "endpoint_override", "retry_limit_seconds", "project_id"),
    "abfs": ("blob_storage_authority", "dfs_storage_authority", "blob_storage_scheme", "dfs_storage_scheme"),
    "hdfs": ("user", "replication"),
    "file": (),
}
"""Schemes, and what may follow the `?` of each."""
_ALIASES = {"gcs": "gs", "abfss": "abfs", "viewfs": "hdfs"}
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or the machine's account",
    "abfs": "AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_CLIENT_SECRET, or the machine's identity",
    "hdfs": "a Kerberos ticket",
}
"""Where each looks for credentials: in the environment."""
_UNFINISHED = ".new"
_PROBE_S = 10.0
"""A place that does not answer in this time can't be used."""

T = TypeVar("T")


class Folder(ABC):
    """A folder; names in it may have slashes. It comes into being with the first file.

    All that fails raises OSError, FileNotFoundError where a file to read is missing.
    """

    local: bool

    @staticmethod
    def at(address: str | Path) -> Folder:
        """The folder at a path or URI. Nothing is looked at there. InputError for a bad address."""
        text = str(address)
        if "://" not in text:
            return LocalFolder(Path(text).expanduser())
        check_address(text)
        if urlsplit(text).scheme == "file":
            return LocalFolder(Path(unquote(urlsplit(text).path)))
        return RemoteFolder.open(text)

    @staticmethod
    def of_file(address: str | Path) -> tuple[Folder, str]:
        """The folder of the file at a path or URI, and the file's name in it."""
        folder = Folder.at(address)
        return folder.parent, folder.name

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def parent(self) -> Folder: ...

    @abstractmethod
    def __str__(self) -> str:
        """The address, by which workers on other machines find it too."""

    @abstractmethod
    def child(self, name: str) -> Folder: ...

    @abstractmethod
    def read_bytes(self, name: str, first: int | None = None) -> bytes:
        """A whole file, or its `first` bytes."""

    @abstractmethod
    def write_bytes(self, name: str, content: bytes | memoryview) -> None:
        """Make or replace a file, durable on return. Readers find the old one or the new one, whole."""

    @abstractmethod
    def modified(self, name: str) -> float | None:
        """When a file was written, in seconds by the clock of where it lies; None if there is none."""

    @abstractmethod
    def sizes(self, *, deep: bool = False) -> dict[str, int]:
        """Bytes of every file by its name, with `deep` of those in folders too. Empty without a folder."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    @abstractmethod
    def clear(self) -> None:
        """Remove all that is in the folder."""

    @abstractmethod
    def upload(self, source: Path, name: str) -> None:
        """Copy a file or folder of this disk here, whatever its size."""

    @abstractmethod
    def download(self, name: str, target: Path) -> None:
        """Copy a file to `target` on this disk, whatever its size; it appears there when it is complete."""

    def exists(self, name: str) -> bool:
        return self.modified(name) is not None

    def names(self) -> list[str]:
        return sorted(self.sizes())


class LocalFolder(Folder):
    """A folder on this disk, or on one that is mounted here."""

    local = True

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def parent(self) -> Folder:
        return LocalFolder(self.path.parent)

    def __str__(self) -> str:
        return str(self.path)

    def child(self, name: str) -> LocalFolder:
        return LocalFolder(self._file(name))

    def read_bytes(self, name: str, first: int | None = None) -> bytes:
        with self._file(name).open("rb") as file:
            return file.read() if first is None else file.read(first)

    def write_bytes(self, name: str, content: bytes | memoryview) -> None:
        with self._replacing(name) as new, new.open("wb") as file:
            file.write(content)

    def modified(self, name: str) -> float | None:
        file = self._file(name)
        return file.stat().st_mtime if file.is_file() else None

    def sizes(self, *, deep: bool = False) -> dict[str, int]:
        found = self.path.rglob("*") if deep else self.path.glob("*")
        return {
            path.relative_to(self.path).as_posix(): path.stat().st_size
            for path in found
            if path.is_file() and path.suffix != _UNFINISHED
        }

    def remove(self, name: str) -> None:
        file = self._file(name)
        for path in (file, *file.parent.glob(f"{glob.escape(file.name)}.*{_UNFINISHED}")):
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def upload(self, source: Path, name: str) -> None:
        for part, path in _files(source):
            with self._replacing(f"{name}/{part}" if part else name) as new:
                shutil.copyfile(path, new)

    def download(self, name: str, target: Path) -> None:
        LocalFolder(target.parent).upload(self._file(name), target.name)

    def _file(self, name: str) -> Path:
        return self.path / _checked(name)

    @contextlib.contextmanager
    def _replacing(self, name: str):
        """A file that takes the place of `name` when it is complete and on the disk."""
        file = self._file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        new = _unfinished(file)
        try:
            yield new
            sync(new)
            os.replace(new, file)
        except OSError:
            with contextlib.suppress(OSError):
                new.unlink()
            raise
        sync(file.parent)


class RemoteFolder(Folder):
    """A folder on a filesystem of pyarrow.

    Object stores show an object when all of it is there. Where files grow under their own names (HDFS),
    a new one is written beside the old one and then takes its name.
    """

    local = False

    def __init__(
        self, files: FileSystem, path: str, uri: str, query: str = "", *, grows: bool = False
    ) -> None:
        """`path` is that of `files`; `uri` names the same folder, `query` what follows its `?`."""
        self._files, self._path, self._uri, self._query, self._grows = files, path, uri, query, grows

    @classmethod
    def open(cls, address: str, *, patient: bool = True) -> RemoteFolder:
        """`address` was checked. Not `patient`: what doesn't answer soon is given up at once."""
        parts = urlsplit(address)
        scheme = _ALIASES.get(parts.scheme, parts.scheme)
        options = dict(parse_qsl(parts.query))
        if scheme == "s3":
            options = _s3_options(parts.netloc, options)
            files, root = _s3(tuple(sorted(options.items())), patient), parts.netloc + unquote(parts.path)
        else:
            if scheme == "gs":
                options.setdefault("retry_limit_seconds", "10")
            files, root = _other(f"{address.partition('?')[0]}?{urlencode(options, safe=':/')}".rstrip("?"))
        uri = f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")
        return cls(files, root.rstrip("/"), uri, urlencode(options, safe=":/"), grows=scheme == "hdfs")

    @property
    def name(self) -> str:
        return self._path.rpartition("/")[2]

    @property
    def parent(self) -> Folder:
        path, _, _ = self._path.rpartition("/")
        uri, _, _ = self._uri.rpartition("/")
        return self._like(path, uri)

    def __str__(self) -> str:
        return f"{self._uri}?{self._query}" if self._query else self._uri

    def child(self, name: str) -> RemoteFolder:
        return self._like(self._at(name), f"{self._uri}/{quote(name)}")

    def read_bytes(self, name: str, first: int | None = None) -> bytes:
        with self._files.open_input_file(self._at(name)) as file:  # a stream would ask for small pieces
            return file.read_at(file.size() if first is None else min(first, file.size()), 0)

    def write_bytes(self, name: str, content: bytes | memoryview) -> None:
        path = self._at(name)
        if not self._grows:
            self._write(path, content)
            return
        self._files.create_dir(path.rpartition("/")[0], recursive=True)
        self._write(path + _UNFINISHED, content)
        self._delete(path)
        self._files.move(path + _UNFINISHED, path)

    def modified(self, name: str) -> float | None:
        from pyarrow.fs import FileType

        info = self._files.get_file_info(self._at(name))
        return info.mtime.timestamp() if info.type == FileType.File else None

    def sizes(self, *, deep: bool = False) -> dict[str, int]:
        from pyarrow.fs import FileSelector, FileType

        found = self._files.get_file_info(FileSelector(self._path, recursive=deep, allow_not_found=True))
        return {
            info.path[len(self._path) + 1 :]: info.size
            for info in found
            if info.type == FileType.File and not info.path.endswith(_UNFINISHED)
        }

    def remove(self, name: str) -> None:
        self._delete(self._at(name))

    def clear(self) -> None:
        self._files.delete_dir_contents(self._path, missing_dir_ok=True)

    def upload(self, source: Path, name: str) -> None:
        for part, path in _files(source):
            self._copy_in(path, f"{name}/{part}" if part else name)

    def download(self, name: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        new = _unfinished(target)
        with self._files.open_input_file(self._at(name)) as file, new.open("wb") as copy:
            at, size = 0, file.size()
            while at < size:
                block = file.read_at(min(_BLOCK_BYTES, size - at), at)
                copy.write(block)
                at += len(block)
        os.replace(new, target)

    def _copy_in(self, source: Path, name: str) -> None:
        if source.stat().st_size <= _BLOCK_BYTES or self._grows:
            self.write_bytes(name, source.read_bytes())
            return
        with source.open("rb") as file, self._files.open_output_stream(self._at(name)) as stream:
            while block := file.read(_BLOCK_BYTES):
                stream.write(block)

    def _write(self, path: str, content: bytes | memoryview) -> None:
        with self._files.open_output_stream(path) as stream:
            stream.write(content)

    def _delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._files.delete_file(path)

    def _at(self, name: str) -> str:
        return f"{self._path}/{_checked(name)}"

    def _like(self, path: str, uri: str) -> RemoteFolder:
        return RemoteFolder(self._files, path, uri, self._query, grows=self._grows)


_BLOCK_BYTES = 16 * 2**20


# ---------------------------------------------------------------------------------- addresses


def check_address(text: str, key: str = "storage", **where: Any) -> None:
    """InputError for an address that could never be used, or that holds credentials. It need not be up."""

    def refuse(problem: str, allowed: str = ALLOWED) -> InputError:
        return InputError(f"{shown_address(text)!r}: {problem}", key=key, allowed=allowed, **where)

    if not text.strip() or "\0" in text:
        raise refuse("names no folder")
    if "://" not in text:
        return
    named = text.partition("://")[0].lower()
    scheme = _ALIASES.get(named, named)
    if scheme not in _OPTIONS:
        raise refuse(f"{named!r} addresses are not known")
    if _holds_credentials(text):
        place = _CREDENTIALS.get(scheme)
        allowed = f"in the environment: {place}" if place else ALLOWED
        raise refuse("credentials must not stand in an address", allowed)
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError as error:
        raise refuse(f"is no address: {error}") from None
    if scheme == "file" and (parts.netloc not in ("", "localhost") or not parts.path):
        raise refuse("names no folder of this machine", "file:///folder")
    if scheme in ("s3", "gs", "abfs") and not parts.netloc:
        raise refuse("names no bucket", f"{parts.scheme}://BUCKET/FOLDER")
    if parts.fragment:
        raise refuse("has a '#'", "it spelled as %23")
    for option in dict(parse_qsl(parts.query, keep_blank_values=True)):
        if option not in _OPTIONS[scheme]:
            known = ", ".join(_OPTIONS[scheme]) or "none"
            raise refuse(f"unknown option {option!r}", f"after the '?': {known}")


def shown_address(text: str) -> str:
    """`text` without what may be credentials: a name and password before the host, unknown options."""
    if "://" not in text:
        return text
    head, _, query = without_password(text).partition("?")
    scheme, _, rest = head.partition("://")
    authority, slash, path = rest.partition("/")
    known = _OPTIONS.get(_ALIASES.get(scheme, scheme), ())
    if "@" in authority and _holds_credentials(head):
        authority = "***@" + authority.rpartition("@")[2]
    pairs = [pair.partition("=") for pair in query.split("&") if pair]
    told = [
        f"{name}={value}" if name in known and "@" not in value else f"{name}=***" for name, _, value in pairs
    ]
    return f"{scheme}://{authority}{slash}{path}" + ("?" + "&".join(told) if told else "")


def _holds_credentials(text: str) -> bool:
    if without_password(text) != text:
        return True  # keys of S3 often have a '/', after which nothing looks like a login any more
    try:
        parts = urlsplit(text)
    except ValueError:
        return "@" in text
    user, at, _ = parts.netloc.rpartition("@")
    scheme = _ALIASES.get(parts.scheme, parts.scheme)
    harmless = {"gs": user == "anonymous", "abfs": ":" not in user, "hdfs": ":" not in user}
    if at and not harmless.get(scheme, False):
        return True
    marks = ("key", "secret", "token", "password", "sas", "credential", "sig")
    return any(
        any(mark in name.lower() for mark in marks) or ("@" in value and "://" in value)
        for name, value in parse_qsl(parts.query, keep_blank_values=True)
    )


def open_storage(text: str, key: str = "storage", *, writing: bool = True, **where: Any) -> Folder:
    """The folder at `text`, after a small file was written there, read and removed; or, without `writing`,
    after a look into it. Nothing stays there, but for the mark of an empty folder that pyarrow makes on S3.

    Raises InputError that names `key`, the address without credentials, what is wrong and what is allowed:
    a bad address, a place that doesn't answer, a bucket that isn't there, no right to write. `where` may
    give `file` and `line`.
    """
    check_address(text, key, **where)
    allowed = ALLOWED
    scheme = _ALIASES.get(urlsplit(text).scheme, urlsplit(text).scheme) if "://" in text else "file"
    if scheme in _CREDENTIALS:
        allowed = f"a folder that can be read and written; credentials come from {_CREDENTIALS[scheme]}"
    try:
        _within(_PROBE_S, functools.partial(_try_out, text, scheme, writing))
        return Folder.at(text)
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, InputError):
            raise InputError(error.problem, key=key, allowed=error.allowed, **where) from None
        problem = f"{shown_address(text)!r} {_explained(error)}"
        raise InputError(problem, key=key, allowed=allowed, **where) from None


def patiently(call: Callable[..., T], *args: Any, seconds: float = 60.0) -> T:
    """`call(*args)`, tried again for so long while it raises OSError other than FileNotFoundError."""
    begun, wait = time.monotonic(), 0.5
    while True:
        try:
            return call(*args)
        except FileNotFoundError:
            raise
        except OSError:
            if time.monotonic() - begun + wait > seconds:
                raise
        time.sleep(wait)
        wait = min(2 * wait, 8.0)


@contextlib.contextmanager
def local_copy(address: str, *parts: str) -> Iterator[Path]:
    """A folder of this disk with what a folder anywhere has; of one elsewhere, `parts` by their beginnings.

    InputError if there is nothing, or the place can't be read.
    """
    folder = Folder.at(address)
    if isinstance(folder, LocalFolder):
        yield Path(address)
        return
    with tempfile.TemporaryDirectory(prefix="hiertune-") as here:
        try:
            names = [name for name in folder.sizes(deep=True) if not parts or name.startswith(parts)]
            for name in names:
                folder.download(name, Path(here) / name)
        except OSError as error:
            raise InputError(f"{shown_address(address)!r} {_explained(error)}") from None
        if not names:
            raise InputError(f"there is nothing in {shown_address(address)}")
        yield Path(here)


def _try_out(text: str, scheme: str, writing: bool) -> None:
    folder = Folder.at(text) if scheme == "file" else RemoteFolder.open(text, patient=False)
    name = f".hiertune-{os.getpid()}-{time.time_ns()}"
    if not folder.local:
        folder.exists(name)  # of all requests, this one is given up soonest
    if not writing:
        return
    with _as_it_was(folder):
        folder.write_bytes(name, b"hiertune\n")
        if folder.read_bytes(name) != b"hiertune\n":
            raise OSError("gives back something else than was written")
        folder.remove(name)


@contextlib.contextmanager
def _as_it_was(folder: Folder) -> Iterator[None]:
    """Folders of this disk that are made within are removed again, unless somebody else uses them by then."""
    paths = [folder.path, *folder.path.parents] if isinstance(folder, LocalFolder) else []
    made = [path for path in paths if not path.exists()]
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def _within(seconds: float, call: Callable[[], None]) -> None:
    """`call()`, or TimeoutError: libraries that look for credentials or a region may take minutes."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001  it is raised in the other thread
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"did not answer within {seconds:.0f} s")
    if raised:
        raise raised[0]


def _explained(error: BaseException) -> str:
    """What is wrong with a place, in words; the library's own where there are no better ones."""
    text = " ".join(str(error).split())
    meanings = {
        "NO_SUCH_BUCKET": "has no such bucket",
        "ACCESS_DENIED": "may not be written or read with these credentials",
        "INVALID_ACCESS_KEY_ID": "does not know this access key",
        "SIGNATURE_DOES_NOT_MATCH": "does not accept this secret key",
        "NETWORK_CONNECTION": "can't be reached",
    }
    for mark, meaning in meanings.items():
        if mark in text:
            return f"{meaning} ({text.partition(': ')[2] or text})"
    if isinstance(error, TimeoutError):
        return text
    if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
        return f"can't be written: {error.strerror}"
    return f"can't be used: {text}"


# --------------------------------------------------------------------------------- filesystems


def _s3_options(bucket: str, options: dict[str, str]) -> dict[str, str]:
    """With endpoint and region written out, so that workers elsewhere need only credentials."""
    options = dict(options)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if "endpoint_override" not in options and endpoint:
        scheme, mark, host = endpoint.rpartition("://")
        if "@" in host:
            raise InputError("AWS_ENDPOINT_URL must hold no credentials", allowed="http://HOST:PORT")
        options["endpoint_override"] = host.rstrip("/")
        if mark:
            options.setdefault("scheme", scheme)
    if "region" not in options:
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if region is None and "endpoint_override" in options:
            region = "us-east-1"  # what stores of one's own call themselves
        if region is None:
            region = _region_of(bucket)
        options["region"] = region
    return options


@functools.cache
def _region_of(bucket: str) -> str:
    from pyarrow.fs import resolve_s3_region

    return resolve_s3_region(bucket)


@functools.cache
def _s3(options: tuple[tuple[str, str], ...], patient: bool) -> FileSystem:
    """Gives up on a request after a few tries of some seconds each; pyarrow's own limits are minutes."""
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    settings: dict[str, Any] = dict(options)
    if "force_virtual_addressing" in settings:
        settings["force_virtual_addressing"] = settings["force_virtual_addressing"].lower() == "true"
    return S3FileSystem(
        **settings,
        connect_timeout=5 if patient else 2,
        request_timeout=20 if patient else 2,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=3 if patient else 1),
        allow_delayed_open=True,  # one request for a small file, not three
    )


@functools.lru_cache(maxsize=256)
def _other(address: str) -> tuple[FileSystem, str]:
    from pyarrow.fs import FileSystem

    return FileSystem.from_uri(address)


# --------------------------------------------------------------------------------------- files


def _checked(name: str) -> str:
    """A name can't lead out of its folder."""
    parts = PurePosixPath(name).parts
    if not parts or name != "/".join(parts) or any(part in ("..", "/") for part in parts) or "\0" in name:
        raise ValueError(f"{name!r} is no name of a file")
    return name


def _unfinished(file: Path) -> Path:
    """A name that no other writer of `file` has."""
    return file.with_name(f"{file.name}.{os.getpid()}-{threading.get_native_id()}{_UNFINISHED}")


def _files(source: Path) -> list[tuple[str, Path]]:
    """The files of a folder by their names in it; a file is its own, without a name."""
    if source.is_file():
        return [("", source)]
    if not source.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(source))
    return [(p.relative_to(source).as_posix(), p) for p in sorted(source.rglob("*")) if p.is_file()]
