"""Which process is which, over machines and boots."""

from __future__ import annotations

import contextlib
import os
import platform
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from typing_extensions import Self

_PROGRAM = uuid.uuid4().hex
"""This process since it last began a program: `exec` changes neither its number nor when it began."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process as it is written down, to be known again. What is empty was not noted by that version."""

    host: str
    """For people: containers, and machines, may have the same name."""
    machine: str = ""
    """Where `pid` means something."""
    pid: int
    born: str = ""
    """When it began, as its system counts: numbers are used again."""
    program: str = ""

    @classmethod
    def this(cls, **more: Any) -> Self:
        """This process, as it is now; `more` are the fields of a subclass."""
        pid = os.getpid()
        return cls(host=platform.node(), machine=machine(), pid=pid, born=born(pid), program=_PROGRAM, **more)

    @property
    def lives(self) -> bool | None:
        """Whether it still runs. None: it can't be told, as of another machine, container or boot."""
        if self.machine != machine():
            return None
        now = born(self.pid)
        if now and not self.born:
            return None
        if not now or now != self.born:
            return False
        return self.pid != os.getpid() or self.program == _PROGRAM


def machine() -> str:
    """Where process numbers mean something: one boot of one system, and one namespace of it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return platform.node()


def born(pid: int) -> str:
    """When a process began, as its system counts; empty if there is none of that number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        if Path("/proc/self").exists():
            return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "unknown"


def end_families(parents: Iterable[psutil.Process], patience_s: float = 5.0) -> None:
    """Kill these processes and all that they have started, and wait until they are gone."""
    families: list[psutil.Process] = []
    for parent in parents:
        families.append(parent)
        with contextlib.suppress(psutil.Error):
            families.extend(parent.children(recursive=True))
    for process in families:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(families, timeout=patience_s)
