"""Every check, with what it looks for really so; and all of them on a machine that is well."""

import contextlib
import http.server
import io
import json
import os
import resource
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from packaging.requirements import Requirement
from rich.console import Console

from hiertune import Taxonomy
from hiertune._database import Place
from hiertune.cli import main
from hiertune.config import SearchConfig
from hiertune.data import write_dataset
from hiertune.doctor import (
    CHECKS,
    Case,
    Check,
    Finding,
    as_json,
    files,
    finding,
    machine,
    print_findings,
    probes,
    services,
)
from hiertune.tracking.spool import SPOOL, encode

SPACE = """name: it
data: {path: data.h5}
model: {backbone: {kind: mlp, hidden: [8]}, head: {kind: linear}}
train: {epochs: 2, batch_size: 8}
"""


def case(tmp_path, config=None, space=None, **environment):
    environment.setdefault("HOME", str(tmp_path))
    full = {"name": "it", **(config or {})}
    return Case(tmp_path / "runs", space, SearchConfig.model_validate(full), environment=environment)


def only(found) -> Finding:
    (one,) = found
    if one.status != "ok":
        assert one.why
        assert one.advice
    return one


@pytest.fixture
def data(tmp_path):
    lineages = [(f"f{i // 2}", f"g{i}") for i in range(4)] * 25
    taxonomy = Taxonomy.from_lineages(lineages, ["family", "genus"])
    inputs = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    path = tmp_path / "data.h5"
    write_dataset(path, inputs, taxonomy.encode(lineages), taxonomy, [f"row{i}" for i in range(100)])
    (tmp_path / "space.yaml").write_text(SPACE)
    return path


# ------------------------------------------------------------------------------- the machinery


def test_a_check_that_crashes_or_hangs_is_a_finding_and_holds_up_no_other(tmp_path):
    ended = threading.Event()

    def crash(case):
        raise KeyError("surprise")
        yield

    def hang(case):
        ended.wait(30)
        yield finding.ok("hang", "too late")

    def fine(case):
        yield finding.ok("fine", "all well")

    checks = [Check("crash", crash), Check("hang", hang, 0.2), Check("fine", fine)]
    begun = time.monotonic()
    found = finding.run_checks(checks, case(tmp_path))
    ended.set()
    assert time.monotonic() - begun < 20
    assert [(each.check, each.status) for each in found] == [
        ("crash", "problem"),
        ("hang", "problem"),
        ("fine", "ok"),
    ]
    assert found[0].what == "the check itself failed: KeyError: 'surprise'"
    assert found[1].what == "no answer within 0.2 s"


def test_a_probe_that_crashes_or_hangs_is_a_finding():
    (crashed,) = finding.probe("no such probe", {}, 60, "it")
    assert crashed.status == "problem"
    assert "KeyError: 'no such probe'" in crashed.what
    (hung,) = finding.probe("torch", {}, 0.05, "it")
    assert hung.what == "no answer within 0.05 s"


def test_names_of_checks_are_different():
    assert len({check.name for check in CHECKS}) == len(CHECKS)


def test_output_fits_80_columns_and_shows_no_control_characters():
    found = [
        finding.ok("python", "3.11"),
        finding.problem("a check", "a\x1b[31m [red]thing[/red]" + "x" * 200, "because", "do\rthis"),
        finding.warning("other", "w", "y", "z"),
    ]
    console = Console(width=80, record=True, file=io.StringIO())
    print_findings(console, found)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert r"a\x1b[31m" in text
    assert "[red]thing[/red]xxx" in text
    assert r"→ do\rthis" in text
    assert text.splitlines()[-1].strip() == "1 problem, 1 warning"
    assert json.loads(as_json(found))["healthy"] is False
    assert json.loads(as_json(found[:1] + found[2:]))["healthy"] is True


# ---------------------------------------------------------------------------------- packages


def test_packages_outside_their_ranges_are_named():
    here = {"absent-package-x", "numpy>=999", "numpy>=1"}
    wrong = {need.name: found for need, found in machine.unmet(map(Requirement, here), {""})}
    assert wrong == {"absent-package-x": None, "numpy": np.__version__}
    marked = Requirement("absent-package-x; extra == 'default'")
    assert not list(machine.unmet([marked], {""}))
    assert list(machine.unmet([marked], {"default"}))


def test_the_installation_is_fine(tmp_path):
    for check in (machine.check_python, machine.check_packages, machine.check_ray_extras):
        assert only(check(case(tmp_path))).status == "ok"


def test_vision_is_looked_at_where_a_space_needs_it(tmp_path, monkeypatch):
    (tmp_path / "s.yaml").write_text("model: {backbone: {kind: timm, name: resnet18}}")
    monkeypatch.setattr(machine, "_version", lambda name: None if name == "timm" else "99.0")
    found = only(machine.check_vision(case(tmp_path, space=tmp_path / "s.yaml")))
    assert found.status == "problem"
    assert "timm is missing" in found.what
    (tmp_path / "s.yaml").write_text("model: {backbone: {kind: mlp}}")
    assert not list(machine.check_vision(case(tmp_path, space=tmp_path / "s.yaml")))


# ---------------------------------------------------------------------------------- machine


@contextlib.contextmanager
def tmpfs(size):
    folder = Path(tempfile.mkdtemp())  # a short name: Ray's sockets are to fit
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True
    ).returncode:
        folder.rmdir()
        pytest.skip("mounting needs rights")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


def test_little_shared_memory_and_a_full_disk(tmp_path):
    with tmpfs("2m") as small:
        found = only(machine.check_shared_memory(case(tmp_path), small))
        assert (found.status, found.what) == ("warning", f"{small} has 2 MiB free")
        assert files.writable("runs folder", small / "runs").status == "problem"  # little room
        (small / "filler").write_bytes(b"x" * 2 * 2**20)
        full = files.writable("runs folder", small / "runs")
        assert full.what == f"{small} can't be written: No space left on device"
        temporary = only(machine.check_temporary(case(tmp_path, RAY_TMPDIR=str(small))))
        assert temporary.what == f"{small} has 0 MiB of 2 MiB free"
        assert sorted(path.name for path in small.iterdir()) == ["filler"]
    assert only(machine.check_shared_memory(case(tmp_path), tmp_path / "none")).status == "warning"


def test_socket_paths_that_are_too_long(tmp_path):
    folder = tmp_path / ("x" * 60)
    folder.mkdir()
    assert "too long" in only(machine.check_temporary(case(tmp_path, RAY_TMPDIR=str(folder)))).what
    missing = only(machine.check_temporary(case(tmp_path, RAY_TMPDIR=str(tmp_path / "none"))))
    assert missing.status == "problem"


def test_limits_in_a_process_that_has_few():
    text = (
        "import resource, sys; from pathlib import Path; from hiertune.doctor import Case, machine\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[1])))\n"
        "for each in machine.check_limits(Case(Path('runs'))): print(each.status, each.what)"
    )
    for limit, status in ((200, "problem"), (2000, "warning")):
        done = subprocess.run(
            [sys.executable, "-c", text, str(limit)], capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith(f"{status} at most {limit} open files")
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 4096:
        assert only(machine.check_limits(Case(Path("runs")))).status == "ok"


def test_cgroups_of_both_versions(tmp_path):
    second, first = tmp_path / "v2", tmp_path / "v1"
    (second / "sys/fs/cgroup").mkdir(parents=True)
    (first / "sys/fs/cgroup/cpu").mkdir(parents=True)
    (first / "sys/fs/cgroup/memory").mkdir()
    for root in (first, second):
        (root / "proc").mkdir()
        (root / "proc/meminfo").write_text("MemTotal: 9999999 kB\nMemAvailable:  8388608 kB\n")
        assert machine.available_memory(root) == 8 * 2**30
    (second / "sys/fs/cgroup/memory.max").write_text("1073741824\n")
    (second / "sys/fs/cgroup/memory.current").write_text("73741824\n")
    (second / "sys/fs/cgroup/cpu.max").write_text("150000 100000\n")
    (first / "sys/fs/cgroup/memory/memory.limit_in_bytes").write_text("2000000000")
    (first / "sys/fs/cgroup/memory/memory.usage_in_bytes").write_text("500000000")
    (first / "sys/fs/cgroup/cpu/cpu.cfs_quota_us").write_text("50000")
    (first / "sys/fs/cgroup/cpu/cpu.cfs_period_us").write_text("100000")
    assert machine.available_memory(second) == 10**9
    assert machine.available_memory(first) == 1_500_000_000
    assert machine.cpu_quota(second / "sys/fs/cgroup") == 1.5
    assert machine.cpu_quota(first / "sys/fs/cgroup") == 0.5
    (second / "sys/fs/cgroup/cpu.max").write_text("max 100000\n")
    (first / "sys/fs/cgroup/cpu/cpu.cfs_quota_us").write_text("-1")
    assert machine.cpu_quota(second / "sys/fs/cgroup") is None
    assert machine.cpu_quota(first / "sys/fs/cgroup") is None


def test_quota_and_memory_below_need(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "available_cores", lambda: 8)
    monkeypatch.setattr(machine, "cpu_quota", lambda: 2.5)
    found = only(machine.check_processors(case(tmp_path)))
    assert (found.status, found.what) == ("warning", "8, of which the container may use 2.5")
    assert "trials x workers is 2" in found.advice
    monkeypatch.setattr(machine, "available_memory", lambda: 2**30)
    assert only(machine.check_memory(case(tmp_path))).status == "warning"
    monkeypatch.setattr(machine, "available_memory", lambda: 2**28)
    assert only(machine.check_memory(case(tmp_path))).status == "problem"


def test_threads(tmp_path):
    assert only(machine.check_threads(case(tmp_path, OMP_NUM_THREADS="1"))).status == "ok"
    found = only(machine.check_threads(case(tmp_path, OMP_NUM_THREADS="8")))
    assert (found.status, found.what) == ("warning", "OMP_NUM_THREADS=8")


# -------------------------------------------------------------------------------------- Ray


def test_token(tmp_path):
    def said(**environment):
        found = only(services.check_token(case(tmp_path, **environment)))
        return found.status, found.what

    token = tmp_path / ".ray" / "auth_token"
    assert said() == ("ok", f"made in {token} when Ray first starts here")
    assert said(RAY_ADDRESS="10.0.0.1:6379", RAY_AUTH_MODE="token") == ("problem", f"{token} does not exist")
    assert said(RAY_AUTH_TOKEN_PATH=str(tmp_path / "t"))[0] == "problem"
    token.parent.mkdir()
    token.write_text("")
    assert said() == ("problem", f"{token} is empty")
    token.write_bytes(b"\xff\xfe\x00")
    assert said() == ("problem", f"{token} can't be read: is not text")
    token.write_text("0" * 64)
    token.chmod(0o644)
    assert said() == ("warning", f"{token} can be read by others")
    token.chmod(0o600)
    assert said() == ("ok", f"{token}, readable by you alone")
    token.unlink()
    token.mkdir()
    assert said() == ("problem", f"{token} can't be read: Is a directory")
    assert said(RAY_AUTH_MODE="disabled")[0] == "warning"
    assert said(RAY_AUTH_MODE="tokn") == ("problem", "RAY_AUTH_MODE=tokn")
    assert said(RAY_AUTH_TOKEN="x") == ("ok", "from RAY_AUTH_TOKEN")


def test_interface(tmp_path, monkeypatch):
    def look(**environment):
        return only(services.check_gloo_interface(case(tmp_path, **environment)))

    found = look(GLOO_SOCKET_IFNAME="nosuch0")
    assert (found.status, found.what) == ("problem", "GLOO_SOCKET_IFNAME=nosuch0")
    assert look(GLOO_SOCKET_IFNAME="lo").status == "ok"
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    assert look().status == "ok"
    found = look(RAY_ADDRESS="10.0.0.1:6379")
    assert found.status == "problem"
    assert "which other nodes can't reach" in found.what
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    assert "is not known" in look().what


def test_ray_is_started_only_if_asked(tmp_path):
    assert "--start-ray tries it" in only(services.check_ray(case(tmp_path))).what


@pytest.mark.slow
@pytest.mark.skipif("sys.platform != 'linux'")
def test_a_cluster_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "2")
    found = only(services.check_ray(case(tmp_path, RAY_ADDRESS="127.0.0.1:1")))
    assert found.status == "problem"


# ---------------------------------------------------------------------------------- servers


class Server(http.server.BaseHTTPRequestHandler):
    """Answers like an MLflow server; `answers` says how, by the first part of the path."""

    answers: dict[str, tuple[int, str]]
    login: str | None

    def do_GET(self):
        path = "experiments" if "experiments" in self.path else self.path.lstrip("/")
        code, text = self.answers.get(path, (404, ""))
        if path == "hang" or code == 0:
            time.sleep(30)
        if path == "experiments" and self.login not in (None, self.headers.get("Authorization")):
            code = 401
        with contextlib.suppress(ConnectionError):  # who asked has stopped waiting
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serve(login=None, **answers):
    standard = {"health": (200, "OK"), "version": (200, "3.17.0"), "experiments": (200, "{}")}
    handler = type("Handler", (Server,), {"answers": standard | answers, "login": login})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def mlflow(tmp_path, uri, **environment):
    return only(services.check_mlflow(case(tmp_path, {"tracking": {"uri": uri}}, **environment)))


def test_mlflow_servers(tmp_path, monkeypatch):
    monkeypatch.setattr(services, "SERVER_SECONDS", 0.3)
    with serve() as host:
        assert mlflow(tmp_path, f"http://{host}").what == f"http://{host}, MLflow 3.17.0"
    with serve(version=(200, "2.9.2")) as host:
        assert mlflow(tmp_path, f"http://{host}").what == f"http://{host} is MLflow 2.9.2"
    with serve(health=(500, "")) as host:
        assert mlflow(tmp_path, f"http://{host}").what == f"http://{host} answers 500"
    with serve(version=(200, "<html>")) as host:
        assert mlflow(tmp_path, f"http://{host}").status == "warning"
    with serve(health=(0, "")) as host:
        found = mlflow(tmp_path, f"http://{host}")
        assert (found.status, found.what) == ("warning", f"http://{host} takes more than 0.3 s to answer")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
        assert "can't be reached" in mlflow(tmp_path, uri).what


def test_a_server_that_does_not_speak_http(tmp_path):
    def answer(listener):
        connection, _ = listener.accept()
        connection.recv(1000)
        connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, args=(listener,), daemon=True).start()
        found = mlflow(tmp_path, f"http://127.0.0.1:{listener.getsockname()[1]}")
    assert found.status == "warning"
    assert "can't be reached: SSH-2.0" in found.what


def test_mlflow_login(tmp_path):
    with serve(login="Basic bWU6czNjcmV0") as host:
        refused = mlflow(tmp_path, f"http://{host}")
        assert (refused.status, refused.what) == ("problem", f"http://{host} refuses the login (401)")
        right = {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "s3cret"}
        assert mlflow(tmp_path, f"http://{host}", **right).status == "ok"


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("127.0.0.1", "Connection refused"),
        ("[::1]", ""),
        ("no-such-host.invalid", ""),
        ("x" * 80 + ".invalid", ""),
    ],
)
def test_a_cluster_that_is_not_there_is_named(tmp_path, host, said):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"{host}:{free.getsockname()[1]}"
    found = only(services.check_ray(case(tmp_path, RAY_ADDRESS=address)))
    assert (found.check, found.status) == ("ray", "problem")
    assert found.what.startswith(f"nothing answers at {address}: {said}")
    assert "correct RAY_ADDRESS" in found.advice


def test_a_cluster_that_listens_and_says_nothing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(services, "RAY_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        found = only(services.check_ray(case(tmp_path, RAY_ADDRESS=address)))
    assert found.what == f"{address} gives no answer within 0.1 s"
    assert "ray status" in found.advice
    assert services._no_listener("auto") is None
    assert services._no_listener("ray://host:10001") is None
    assert services._no_listener("127.0.0.1:99999")


def test_mlflow_addresses(tmp_path):
    assert mlflow(tmp_path, None).status == "ok"
    assert "no longer tracks into folders" in mlflow(tmp_path, "./mlruns").what
    (tmp_path / "x.db").write_text("not a database, but some text")
    assert "is not an SQLite database" in mlflow(tmp_path, f"sqlite:///{tmp_path}/x.db").what


def test_ledger(tmp_path):
    def look(uri=None, **environment):
        return only(services.check_ledger(case(tmp_path, {"ledger": uri}, **environment)))

    assert look().status == "ok"
    assert look(f"sqlite:///{tmp_path}/new.db").status == "ok"
    assert not (tmp_path / "new.db").exists()
    (tmp_path / "bad.db").write_text("x" * 4096)
    assert look(f"sqlite:///{tmp_path}/bad.db").what.endswith("file is not a database")
    assert look("postgresql+psycopg://me:hush@127.0.0.1:1/db").what == "the password stands in the space file"
    gone = look(HIERTUNE_LEDGER="postgresql+psycopg://me:hush@127.0.0.1:1/db")
    assert gone.status == "problem"
    assert gone.what.startswith("postgresql+psycopg://me:***@127.0.0.1:1/db can't be used")
    assert "hush" not in repr(gone)
    assert look("no address").status == "problem"
    assert look(HIERTUNE_LEDGER="").status == "ok", "as if it were not set"
    for typo in ("postgresql//me:hush@host/db", "postgresql+psycopg://me:hush@host:port/db"):
        found = look(HIERTUNE_LEDGER=typo)
        assert (found.status, found.what) == ("problem", "is not the address of a database")
        assert "hush" not in repr(found)
    queried = look(HIERTUNE_LEDGER="postgresql+psycopg://me@127.0.0.1:1/db?password=hush")
    assert queried.status == "problem"
    assert "hush" not in repr(queried)


def test_storage(tmp_path):
    def look(uri):
        return only(services.check_storage(case(tmp_path, HIERTUNE_STORAGE=uri)))

    assert look(str(tmp_path / "new")).status == "ok"
    assert look(f"file://{tmp_path}/new").status == "ok"
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    assert look(str(tmp_path / "file" / "x")).what == f"{tmp_path / 'file'} is a file"
    assert look("nosuch://bucket/x").status == "problem"
    for address in ("s3://key:hush@bucket/x", "s3://bucket/x?session_token=hush"):
        found = look(address)
        assert found.what.endswith("credentials must not stand in an address")
        assert "AWS_SECRET_ACCESS_KEY" in found.advice
        assert "hush" not in repr(found)
    assert look("").what == "the run folder"


def test_a_storage_s_path_starts_where_the_space_is(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    space = tmp_path / "spaces" / "space.yaml"
    found = only(services.check_storage(case(tmp_path, {"storage": "kept"}, space)))
    assert found.what.startswith(f"{tmp_path / 'spaces' / 'kept'} has ")


# --------------------------------------------------------------------------- runs and leftovers


def leave(runs, name, **files_there):
    folder = runs / name
    folder.mkdir(parents=True)
    (folder / "ledger.log").write_text("")
    for file, content in files_there.items():
        (folder / file.replace("__", ".")).write_bytes(content)
    return folder


def spool(*operations, pid):
    header = {"op": "open", "t": 0, "trial": None, "uri": "http://x", "experiment": "e", "search": "s"}
    lines = encode({**header, "uid": "u", "pid": pid}, 0)
    for number, operation in enumerate(operations, start=1):
        lines += encode({"op": operation, "t": 0, "trial": None, "metrics": {"a": 1.0}, "step": 0}, number)
    return lines


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers(tmp_path):
    def said():
        return [(each.status, each.what) for each in files.check_leftovers(case(tmp_path))]

    runs = tmp_path / "runs"
    assert said() == []  # no runs folder, nothing left in it
    runs.mkdir()
    (runs / "mlflow.db").write_text("")
    assert said() == [("ok", f"none in {runs}")]
    leave(runs, "done", summary__json=b"{}")
    live = leave(runs, "live")
    (live / SPOOL).write_bytes(spool("log", pid=os.getpid()))
    assert said() == [("ok", f"none in {runs}")]
    dead = leave(runs, "dead")
    (dead / SPOOL).write_bytes(spool("log", "log", pid=dead_pid()))
    lock = dead / "ledger.log.lock"
    lock.write_text("")
    os.utime(lock, (0, 0))
    (dead / "stop-request").write_text("")  # which the search removes when it is resumed
    found = said()
    assert [what.split(":")[0] for _, what in found] == ["dead"] * 3
    assert found[0] == ("warning", "dead: 2 of 2 points are not delivered")
    assert found[1] == ("warning", "dead: was broken off")
    assert found[2][1].startswith("dead: ledger.log.lock is")


def test_a_search_whose_ledger_is_a_database_can_be_broken_off_too(tmp_path):
    run = tmp_path / "runs" / "it"
    run.mkdir(parents=True)
    Place(run / "ledger.log", "sqlite:////x.db").point("uid")
    found = only(files.check_leftovers(case(tmp_path)))
    assert (found.status, found.what) == ("warning", "it: was broken off")
    (run / "summary.json").write_text("{}")
    assert only(files.check_leftovers(case(tmp_path))).status == "ok"


def test_what_is_advised_can_be_typed(tmp_path):
    runs = tmp_path / "my runs"
    dead = leave(runs, "it")
    (dead / SPOOL).write_bytes(spool("log", pid=dead_pid()))
    (dead / "ledger.log.lock").write_text("")
    os.utime(dead / "ledger.log.lock", (0, 0))
    delivery, _, lock = files.check_leftovers(replace(case(tmp_path), runs=runs))
    assert shlex.split(delivery.advice)[1:] == ["track", "sync", str(dead)]
    assert shlex.split(lock.advice) == ["rm", str(dead / "ledger.log.lock")]
    (tmp_path / "my token").write_text("token")
    (tmp_path / "my token").chmod(0o644)
    token = only(services.check_token(case(tmp_path, RAY_AUTH_TOKEN_PATH=str(tmp_path / "my token"))))
    assert shlex.split(token.advice) == ["chmod", "600", str(tmp_path / "my token")]


def test_runs_folder_that_is_a_file_or_read_only(tmp_path):
    (tmp_path / "runs").write_text("")
    assert only(files.check_runs(case(tmp_path))).what == f"{tmp_path / 'runs'} is a file"
    assert files.writable("runs folder", Path("/proc/self")).status == "problem"


# ----------------------------------------------------------------------------- space and data


def test_filesystems(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(f"none / ext4 rw 0 0\nhost:/x {tmp_path}/a\\040b nfs4 rw 0 0\n")
    (tmp_path / "a b").mkdir()
    assert files.filesystem_of(tmp_path / "a b" / "x.h5", mounts) == "nfs4"
    assert files.filesystem_of(tmp_path / "x.h5", mounts) == "ext4"


def test_data_on_a_network_and_data_that_is_written(tmp_path, data, monkeypatch):
    def look(**environment):
        return only(files.check_data_files(case(tmp_path, space=tmp_path / "space.yaml", **environment)))

    assert look().status == "ok"
    monkeypatch.setattr(files, "filesystem_of", lambda path: "nfs4")
    assert (look().status, look().what) == ("warning", "data.h5 is on nfs4")
    assert look(HDF5_USE_FILE_LOCKING="FALSE").status == "ok"
    with h5py.File(data, "r+"):
        assert (look().status, look().what) == ("problem", "data.h5 is locked")

    def no_locks(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    assert look().status == "warning"
    assert look(HDF5_USE_FILE_LOCKING="TRUE").status == "problem"


def test_a_space_that_is_fine_and_what_is_wrong_with_others(tmp_path, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = list(probes.examine_space("space.yaml", "runs"))
    assert [each.status for each in found] == ["ok", "ok"]
    (tmp_path / "space.yaml").write_text(SPACE.replace("epochs", "epoch"))
    broken = only(probes.examine_space("space.yaml", "runs"))
    assert broken.what.startswith("space.yaml:4: train.epoch: unknown key")
    assert only(probes.examine_space("none.yaml", "runs")).status == "problem"
    (tmp_path / "space.yaml").write_text(SPACE + "mix: {kind: mixup, level: family}\n")
    assert [each.status for each in probes.examine_space("space.yaml", "runs")] == ["warning", "ok", "ok"]
    (tmp_path / "space.yaml").write_text(SPACE)
    (tmp_path / "runs" / "it").mkdir(parents=True)
    (tmp_path / "runs" / "it" / "ledger.log").write_text("")
    (tmp_path / "runs" / "it" / "space.yaml").write_text(SPACE)
    assert "--resume goes on with it" in next(iter(probes.examine_space("space.yaml", "runs"))).what
    data.write_bytes(data.read_bytes()[:-3000])
    assert "truncated or damaged" in only(probes.examine_space("space.yaml", "runs")).what


def test_the_whole_command(tmp_path, data, monkeypatch, capsys):
    """In processes of their own: the space, its data, and gloo; on this machine, which is well."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = sorted(tmp_path.rglob("*"))
    with contextlib.suppress(SystemExit):
        main(["doctor", "space.yaml", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"], report
    assert {each["check"] for each in report["findings"]} >= {"space", "data", "gloo", "ray", "runs folder"}
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "space.yaml").write_text("name: it\n")
    monkeypatch.setattr("hiertune.doctor.CHECKS", [check for check in CHECKS if check.name == "space"])
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "space.yaml"])
    assert ended.value.code == 1
    assert "problem" in capsys.readouterr().out
