"""Settings that all tests share, and generated images."""

import contextlib
import importlib.util
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import psutil
import pytest
import torch

sys.path.append(str(Path(__file__).parent))
import s3

# Two processes of one compute thread each are faster than one of two, and small layers suffer most.
torch.set_num_threads(1)

# Ignored by whatever a shell starts with `&` or by nohup, and by all that it starts in turn.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

_BENCH = Path(__file__).parents[1] / "scripts" / "bench"


@pytest.fixture(scope="session")
def bench_module():
    """`bench_module(name)`: a module of the benchmarks, which are no package."""

    def load(name):
        spec = importlib.util.spec_from_file_location(f"hiertune_bench{name}", _BENCH / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # its dataclasses look for it there
        sys.path.insert(0, str(_BENCH))  # it finds the others as when it is run
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(_BENCH))
        return module

    return load


@pytest.fixture(scope="session")
def shape_images(bench_module):
    """`shape_images(rows, size, seed)`: the data set of the image benchmark."""
    return bench_module("_shapes").shape_images


class PostgreSQL:
    """A server of our own on loopback, run as an unprivileged user: it refuses to run as root."""

    def __init__(self, programs, folder):
        self._programs, self._data, self._log = programs, folder / "data", folder / "log"
        self._user = ["runuser", "-u", "nobody", "--"] if os.getuid() == 0 else []
        self._names = itertools.count()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        if self._user:
            shutil.chown(folder, "nobody")
        login = ["-U", "hiertune", "--auth=scram-sha-256", f"--pwfile={self._password_file(folder)}"]
        self._run("initdb", "-D", self._data, *login, "--no-sync", "--no-locale", "--encoding=UTF8")

    password = "s3cret"

    def _password_file(self, folder):
        file = folder / "password"
        file.write_text(self.password)
        if self._user:
            shutil.chown(file, "nobody")
        return file

    def _run(self, program, *args):
        command = [*self._user, str(self._programs / program), *map(str, args)]
        subprocess.run(command, check=True, capture_output=True, text=True, cwd="/")

    def start(self):
        options = f"-h 127.0.0.1 -p {self.port} -c unix_socket_directories= -c fsync=off"
        self._run("pg_ctl", "-D", self._data, "-l", self._log, "-o", options, "-w", "-t", 120, "start")

    def stop(self, mode="fast"):
        self._run("pg_ctl", "-D", self._data, "-m", mode, "-w", "-t", 120, "stop")

    @contextlib.contextmanager
    def hung(self):
        """Within, it answers nobody: its processes are stopped, and the kernel takes what is sent to them."""
        postmaster = psutil.Process(int((self._data / "postmaster.pid").read_text().split()[0]))
        postmaster.send_signal(signal.SIGSTOP)  # first, that it starts none
        processes = [postmaster, *postmaster.children(recursive=True)]
        try:
            _signal(processes, signal.SIGSTOP)
            yield
        finally:
            _signal(processes, signal.SIGCONT)

    def connected(self):
        """A connection of psycopg's own, that commits each statement."""
        import psycopg

        login = {"host": "127.0.0.1", "port": self.port, "user": "hiertune", "password": self.password}
        return psycopg.connect(**login, dbname="postgres", autocommit=True)

    def new_database(self):
        """The address of an empty database, without its password (that is in PGPASSWORD)."""
        name = f"test{next(self._names)}"
        with self.connected() as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql+psycopg://hiertune@127.0.0.1:{self.port}/{name}"

    def close(self, url):
        """End the connections to one of its databases, and take no new ones, until `open`."""
        name = url.rpartition("/")[2]
        with self.connected() as connection:
            connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            ended = "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE datname = %s"
            connection.execute(ended, [name])

    def open(self, url):
        with self.connected() as connection:
            connection.execute(f"ALTER DATABASE {url.rpartition('/')[2]} ALLOW_CONNECTIONS true")


def _signal(processes, number):
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # some do their work and end
            process.send_signal(number)


@pytest.fixture(scope="session")
def postgresql_server():
    """A real PostgreSQL. Where it is not installed tests are skipped, but not in CI."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not folders:
        reason = "PostgreSQL is not installed (Debian: apt-get install postgresql)"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    with tempfile.TemporaryDirectory(
        prefix="hiertune-pg-"
    ) as folder:  # pytest's own are closed to other users
        server = PostgreSQL(folders[-1], Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop("immediate")


@pytest.fixture
def postgresql(postgresql_server, monkeypatch):
    """The address of an empty PostgreSQL database; its password is in the environment."""
    monkeypatch.setenv("PGPASSWORD", postgresql_server.password)
    return postgresql_server.new_database()


@pytest.fixture(scope="session")
def s3_endpoint():
    """`host:port` of a real S3 API with the bucket of `s3.BUCKET`."""
    with s3.s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def s3_environment(s3_endpoint, monkeypatch):
    """The settings by which S3 is found; credentials too."""
    settings = {
        "AWS_ENDPOINT_URL": f"http://{s3_endpoint}",
        "AWS_ACCESS_KEY_ID": s3.ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": s3.SECRET_KEY,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_REGION": "us-east-1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return settings


@pytest.fixture
def s3_folder(s3_environment, tmp_path_factory):
    """The URI of an empty folder."""
    return f"s3://{s3.BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def faulty_s3(s3_environment, s3_endpoint, monkeypatch):
    """The way to S3, on which things can go wrong: `s3.FaultyWay`."""
    way = s3.FaultyWay(s3_endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{way.endpoint}")
    yield way
    way.close()
