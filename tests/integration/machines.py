"""Several machines on one: each has its own processes, network interface and Ray node.

A machine is a network and a process namespace: addresses 10.77.0.0/24 on a bridge that only these machines
see, and one signal ends all that runs in it, as a power cut does. Where the tests may not make namespaces,
`WHY_NOT` says so.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

_UNSHARE = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc"]
_INIT = ["bash", "-c", "sleep infinity & wait"]  # a shell as the first process also buries orphans
_BIN = Path(sys.executable).parent


def _why_not() -> str | None:
    if os.geteuid() != 0:
        return "separate network namespaces need root"
    tried = subprocess.run(
        [
            "unshare",
            "--net",
            "--pid",
            "--fork",
            "--mount",
            "--mount-proc",
            "ip",
            "link",
            "add",
            "type",
            "bridge",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else None


WHY_NOT = _why_not()


class Machine:
    """One machine: a namespace, and what runs in it."""

    def __init__(self, room: MachineRoom, number: int) -> None:
        self.room = room
        self.address = f"10.77.0.{number}"
        self._holder = subprocess.Popen([*_UNSHARE, *_INIT], stderr=subprocess.DEVNULL)
        self._init = _only_child(self._holder.pid)
        room.plug_in(self._init, number, self.address)
        # Ray's files are the machine's own, under one path on all machines.
        Path("/tmp/ray").mkdir(exist_ok=True)
        done = self.run(["mount", "-t", "tmpfs", "ray", "/tmp/ray"], capture_output=True)
        assert done.returncode == 0, done.stderr

    def start(self, command: list[str], cwd: Path, **options) -> subprocess.Popen:
        """A process on this machine. A signal to it must go to `inner(process)`."""
        return subprocess.Popen([*self._enter(cwd), *map(str, command)], **options)

    def run(self, command: list[str], **options) -> subprocess.CompletedProcess:
        """A command on this machine, in its root folder."""
        return subprocess.run(
            [*self._enter(Path("/")), *map(str, command)], check=False, text=True, **options
        )

    def _enter(self, folder: Path) -> list[str]:
        """Who enters another file system tree leaves its working folder."""
        enter = ["nsenter", f"--target={self._init}", "--net", "--pid", "--mount"]
        return [*enter, "--", "env", f"--chdir={folder}"]

    def start_ray(self, cpus: int, head: Machine | None = None, gpus: int = 0) -> None:
        """Its Ray node: the cluster's head, or one that joins it. Of GPUs Ray only counts how many it has."""
        where = ["--head", "--port=6379"] if head is None else [f"--address={head.address}:6379"]
        done = self.run(
            [
                _BIN / "ray",
                "start",
                *where,
                f"--node-ip-address={self.address}",
                f"--num-cpus={cpus}",
                f"--num-gpus={gpus}",
                "--object-store-memory=80000000",
                "--dashboard-host=127.0.0.1",
                "--disable-usage-stats",
            ],
            env=self.room.environment,
            capture_output=True,
            timeout=180,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def processes(self) -> list[psutil.Process]:
        return psutil.Process(self._init).children(recursive=True)

    def cut_the_power(self) -> None:
        if self._holder.poll() is None:
            os.kill(self._init, signal.SIGKILL)
            self._holder.wait()


class MachineRoom:
    """The machines of one test, and the bridge between them. Use as a context manager."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        """`folder` is seen by all of them, as a network file system is."""
        self.folder = folder
        token = folder / "token"
        token.write_text("0123456789abcdef" * 4)
        token.chmod(0o600)
        self.environment = environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self.machines: list[Machine] = []

    def __enter__(self) -> MachineRoom:
        self._switch = subprocess.Popen([*_UNSHARE, *_INIT], stderr=subprocess.DEVNULL)
        self._bridge = _only_child(self._switch.pid)
        self._ip(self._bridge, "link add bridge type bridge")
        self._ip(self._bridge, "link set bridge up")
        return self

    def __exit__(self, *exc_info) -> None:
        for machine in self.machines:
            machine.cut_the_power()
        self._switch.kill()
        self._switch.wait()

    def machine(self) -> Machine:
        self.machines.append(Machine(self, len(self.machines) + 1))
        return self.machines[-1]

    def plug_in(self, init: int, number: int, address: str) -> None:
        """A cable from the bridge to a machine's only interface, beside its loopback."""
        self._ip(self._bridge, f"link add port{number} type veth peer name veth0 netns {init}")
        self._ip(self._bridge, f"link set port{number} master bridge up")
        for command in (f"addr add {address}/24 dev veth0", "link set veth0 up", "link set lo up"):
            self._ip(init, command)

    @staticmethod
    def _ip(init: int, command: str) -> None:
        subprocess.run(["nsenter", f"--target={init}", "--net", "ip", *command.split()], check=True)


def inner(process: subprocess.Popen) -> int:
    """The process that `Machine.start` started, as this machine numbers it."""
    return _only_child(process.pid)


def _only_child(parent: int) -> int:
    deadline = time.monotonic() + 30
    while not (children := psutil.Process(parent).children()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return children[0].pid
