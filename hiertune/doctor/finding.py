"""Checks and what they find. A check that crashes or never ends is a finding too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from hiertune.config import SearchConfig

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """What one check has to say."""

    check: str
    status: Status
    what: str
    """What is so."""
    why: str = ""
    """Why it matters; empty where all is well."""
    advice: str = ""
    """What to do about it."""


def ok(check: str, what: str) -> Finding:
    return Finding(check, "ok", what)


def warning(check: str, what: str, why: str, advice: str) -> Finding:
    return Finding(check, "warning", what, why, advice)


def problem(check: str, what: str, why: str, advice: str) -> Finding:
    return Finding(check, "problem", what, why, advice)


@dataclass(frozen=True)
class Case:
    """What is to be examined."""

    runs: Path
    space: Path | None = None
    config: SearchConfig | None = None
    """Of the space; None without a space, or with one that can't be read."""
    start_ray: bool = False
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)

    @property
    def cluster(self) -> str | None:
        """Address of the Ray cluster to join; None where Ray is to be started here."""
        return self.environment.get("RAY_ADDRESS") or None


@dataclass(frozen=True)
class Check:
    """One thing to look at. `look` raises nothing that it expects, and yields at least one finding."""

    name: str
    look: Callable[[Case], Iterable[Finding]]
    seconds: float = 10.0
    """After which it is given up."""


def run_checks(checks: Iterable[Check], case: Case) -> list[Finding]:
    """Findings in the order of the checks, which run at the same time, each to its end or its limit."""
    running = [_Running(check, case) for check in checks]
    return [finding for each in running for finding in each.findings()]


class _Running:
    """A check in a thread of its own: one that hangs in a dead file system or server holds up nobody."""

    def __init__(self, check: Check, case: Case) -> None:
        self._check = check
        self._found: list[Finding] = []
        self._begun = time.monotonic()
        self._thread = threading.Thread(target=self._run, args=(case,), daemon=True)
        self._thread.start()

    def _run(self, case: Case) -> None:
        try:
            found = list(self._check.look(case))
        except Exception as error:  # noqa: BLE001 - whatever breaks a check is what it found
            found = [
                problem(
                    self._check.name,
                    f"the check itself failed: {type(error).__name__}: {error}",
                    "what it looks at is in a state that nobody thought of",
                    "look at it by hand, and report this message",
                )
            ]
        self._found = found

    def findings(self) -> list[Finding]:
        self._thread.join(max(0.0, self._begun + self._check.seconds - time.monotonic()))
        if not self._thread.is_alive():
            return self._found
        return [
            problem(
                self._check.name,
                f"no answer within {self._check.seconds:g} s",
                "a search would wait for the same thing",
                "see whether the file system or server that it asks still answers",
            )
        ]


def probe(
    name: str, arguments: Mapping[str, Any], seconds: float, check: str, late: Finding | None = None
) -> list[Finding]:
    """Run a function of `hiertune.doctor.probes` in a process of its own.

    For what may crash, hang without letting go of the interpreter, or leave something behind: HDF5, gloo,
    CUDA and Ray. The process is ended after `seconds`, which is a finding (`late`), and so is what ended it
    early.
    """
    command = [sys.executable, "-m", "hiertune.doctor", name, json.dumps(dict(arguments))]
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            timeout=seconds,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        why, advice = "a search would wait for the same thing", "see what it waits for: a server, a disk?"
        return [late or problem(check, f"no answer within {seconds:g} s", why, advice)]
    lines = done.stdout.decode(errors="replace").splitlines()
    found = [Finding(**json.loads(line.removeprefix(MARK))) for line in lines if line.startswith(MARK)]
    if done.returncode != 0:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        what = f"the check ended with code {done.returncode}: {last[0]}"
        found.append(problem(check, what, "a search may end in the same way", "look at the message"))
    return found


MARK = "hiertune-finding "
"""Before every finding that a probe prints: libraries print there too."""


def tell(found: Iterable[Finding]) -> None:
    """Of a probe: print findings for the process that reads them."""
    for finding in found:
        print(MARK + json.dumps(asdict(finding)), flush=True)
