"""The machine: packages, memory, limits, threads."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from hiertune.doctor.finding import Case, Finding, ok, problem, warning

MIB, GIB = 2**20, 2**30
OBJECT_STORE_BYTES = 256 * MIB  # of hiertune.search.cluster, which can't be imported without Ray
GROUP_BYTES = 2 * GIB
"""What one worker group of one worker takes: two processes with torch, the helpers of Ray and Train."""


# ------------------------------------------------------------------------------------ packages


def check_python(case: Case) -> Iterator[Finding]:
    wanted = str(importlib.metadata.metadata("hiertune")["Requires-Python"])
    found = platform.python_version()
    if found in SpecifierSet(wanted):
        yield ok("python", f"{found} ({wanted} is tested)")
        return
    why = "Ray, torch and Optuna have other releases for other versions of Python"
    yield problem("python", f"{found} is not {wanted}", why, "make a virtual environment with one of these")


def check_packages(case: Case) -> Iterator[Finding]:
    """Against the ranges in hiertune's own metadata, which every wheel carries; in a checkout also
    against the versions in `constraints.txt`, which wheels don't have."""
    wrong = list(unmet(map(Requirement, importlib.metadata.requires("hiertune") or ()), {""}))
    ranges = "the ranges that hiertune was installed with"
    if wrong:
        why = f"hiertune is tested with {ranges}"
        advice = f"pip install {' '.join(repr(str(need)) for need, _ in wrong)}"
        yield problem("packages", "; ".join(map(_said, wrong)), why, advice)
        return
    pins = Path(__file__).resolve().parents[2] / "constraints.txt"
    if not pins.is_file():
        yield ok("packages", f"all in {ranges}")
        return
    tested = [Requirement(line.partition("#")[0]) for line in _lines(pins)]
    meant = [need for need in tested if not need.marker or need.marker.evaluate()]
    here = [(need, found) for need in meant if (found := _version(need.name)) is not None]
    other = [need.name for need, found in here if not need.specifier.contains(found, prereleases=True)]
    shown = (
        f", {len(other)} differ: {', '.join(other[:3])}{' ...' if len(other) > 3 else ''}" if other else ""
    )
    yield ok(
        "packages", f"all in {ranges}; {len(here) - len(other)} of {len(here)} as in constraints.txt{shown}"
    )


def check_ray_extras(case: Case) -> Iterator[Finding]:
    """Of `ray[default]` (dashboard and state API), `tune` and `train`."""
    needs = [Requirement(text) for text in importlib.metadata.requires("ray") or ()]
    missing = list(unmet(needs, {"default", "tune", "train"}))
    if not missing:
        yield ok("ray extras", f"ray {_version('ray')} with default, tune and train")
        return
    why = "without ray[default] every stopped trial leaves a placement group and an actor behind"
    advice = f"pip install 'ray[default,tune,train]=={_version('ray')}'"
    yield problem("ray extras", "; ".join(map(_said, missing)), why, advice)


def check_vision(case: Case) -> Iterator[Finding]:
    """timm and torchvision, where the space needs them."""
    if case.space is None or "timm" not in _text(case.space):
        return
    needs = map(Requirement, importlib.metadata.requires("hiertune") or ())
    missing = list(unmet((need for need in needs if need.marker), {"vision"}))
    if missing:
        why = "the space has a timm backbone"
        yield problem("vision", "; ".join(map(_said, missing)), why, "pip install 'hiertune[vision]'")
    else:
        yield ok("vision", f"timm {_version('timm')}, torchvision {_version('torchvision')}")


def unmet(needs: Iterable[Requirement], extras: set[str]) -> Iterator[tuple[Requirement, str | None]]:
    """Requirements of these extras that the environment does not meet, each with the version found."""
    for need in needs:
        if need.marker and not any(need.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        found = _version(need.name)
        if found is None or not need.specifier.contains(found, prereleases=True):
            need.marker = None
            yield need, found


def _said(unmet: tuple[Requirement, str | None]) -> str:
    need, found = unmet
    return f"{need.name} is missing" if found is None else f"{need.name} is {found}, not {need.specifier}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _lines(path: Path) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in path.read_text("utf-8").splitlines())
    return [line for line in lines if line]


def _text(path: Path) -> str:
    try:
        return path.read_bytes()[: 1 << 18].decode("utf-8", "replace")
    except OSError:
        return ""  # the check of the space says so


# -------------------------------------------------------------------------------- memory, disk


def check_shared_memory(case: Case, folder: Path = Path("/dev/shm")) -> Iterator[Finding]:  # nosec B108 - looked at, not written
    if not folder.is_dir():
        if sys.platform == "linux":
            yield _little_shared_memory(f"{folder} is missing")
        else:
            yield ok("shared memory", "not a file system here")
        return
    free = shutil.disk_usage(folder).free
    if free < OBJECT_STORE_BYTES * 1.1:
        yield _little_shared_memory(f"{folder} has {size(free)} free")
    else:
        yield ok("shared memory", f"{folder} has {size(free)} free")


def _little_shared_memory(what: str) -> Finding:
    need = size(OBJECT_STORE_BYTES)
    why = f"Ray keeps its objects there ({need}), and NCCL its buffers; else on disk, slowly"
    return warning("shared memory", what, why, "start the container with --shm-size=1g or more")


def check_memory(case: Case) -> Iterator[Finding]:
    free = available_memory()
    groups = 1 if case.config is None else case.config.search.workers_per_trial
    need = GROUP_BYTES * groups
    if free >= need:
        yield ok("memory", f"{size(free)} available")
        return
    why = f"one worker group takes about {size(need)}; beyond its memory, Ray or the kernel kills workers"
    found = problem if free < need / 4 else warning
    advice = "give the container more memory, or set search.max_concurrent or workers_per_trial lower"
    yield found("memory", f"{size(free)} available", why, advice)


def check_temporary(case: Case) -> Iterator[Finding]:
    """Ray's session folder: its room, and the length of the paths of its sockets."""
    folder = Path(case.environment.get("RAY_TMPDIR") or tempfile.gettempdir())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        why = "Ray keeps its sockets and logs there"
        yield problem("temporary", f"{folder} can't be written", why, "set RAY_TMPDIR to a folder that can")
        return
    longest = len(os.fsencode(folder)) + len(
        "/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
    )
    if longest > 107:
        why = f"the paths of sockets must not be longer than 107 bytes, and Ray's would have {longest}"
        yield problem("temporary", f"{folder} is too long a name", why, "set RAY_TMPDIR to a shorter one")
        return
    usage = shutil.disk_usage(folder)
    if usage.free < 0.05 * usage.total:
        why = "Ray creates no objects on a disk that is more than 95% full"
        yield problem(
            "temporary",
            f"{folder} has {size(usage.free)} of {size(usage.total)} free",
            why,
            "make room, or set RAY_TMPDIR to another disk",
        )
        return
    yield ok("temporary", f"{folder} has {size(usage.free)} free")


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that may be taken: what the system can give, or its container (cgroup v1 or v2) allows."""
    meminfo = root / "proc/meminfo"
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines() if ":" in line)
    free = int(fields["MemAvailable"].split()[0]) * 1024
    cgroups = root / "sys/fs/cgroup"
    pairs = (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    )
    for limit, usage in pairs:
        allowed, used = _number(cgroups / limit), _number(cgroups / usage)
        if allowed is not None and allowed < 2**60:
            free = min(free, int(allowed - (used or 0)))
    return max(free, 0)


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{count / MIB:,.0f} MiB"


# -------------------------------------------------------------------------- processors, limits


def check_processors(case: Case) -> Iterator[Finding]:
    cores, quota = available_cores(), cpu_quota()
    if quota is None or quota >= cores:
        yield ok("processors", f"{cores}")
        return
    why = "Ray places workers by the number of processors, and so many would get in each other's way"
    most = max(1, math.floor(quota))
    advice = f"set search.max_concurrent so that trials x workers is {most}, or raise the quota"
    yield warning("processors", f"{cores}, of which the container may use {quota:g}", why, advice)


def available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Processors that the container may keep busy (cgroup v2, then v1); None without a limit."""
    second = root / "cpu.max"
    if second.exists():
        quota, period = second.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    allowed, period_us = _number(root / "cpu/cpu.cfs_quota_us"), _number(root / "cpu/cpu.cfs_period_us")
    return allowed / period_us if allowed and period_us and allowed > 0 else None


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None


def check_limits(case: Case) -> Iterator[Finding]:
    files = _soft(resource.RLIMIT_NOFILE)
    processes = min(_soft(resource.RLIMIT_NPROC), _number(Path("/sys/fs/cgroup/pids.max")) or math.inf)
    why = "one worker group is some ten processes of many threads and sockets each"
    well = True
    for what, limit, least, option in (
        ("open files", files, 1024, "ulimit -n 65536"),
        ("processes and threads", processes, 1024, "ulimit -u 16384"),
    ):
        if limit < 4 * least:
            well = False
            found = problem if limit < least else warning
            advice = f"`{option}` before hiertune starts, or the container's or limits.conf's setting"
            yield found("limits", f"at most {limit:g} {what}", why, advice)
    if well:
        yield ok("limits", f"{_shown(files)} open files, {_shown(processes)} processes")


def _soft(kind: int) -> float:
    limit = resource.getrlimit(kind)[0]
    return math.inf if limit == resource.RLIM_INFINITY else limit


def _shown(limit: float) -> str:
    return "unlimited" if math.isinf(limit) else f"{limit:,.0f}"


def check_threads(case: Case) -> Iterator[Finding]:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        given = case.environment.get(name)
        if given not in (None, "1"):
            why = "workers of several threads are slower on CPU than as many more workers of one"
            advice = f"`unset {name}`; train.threads sets it per trial where more are wanted"
            yield warning("threads", f"{name}={given}", why, advice)
            return
    yield ok("threads", "one per worker, unless train.threads says otherwise")
