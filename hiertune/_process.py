"""Which process is which, over machines and boots."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable
from pathlib import Path

import psutil


def machine() -> str:
    """Where process numbers mean something: one boot of one system, and one namespace of it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


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
