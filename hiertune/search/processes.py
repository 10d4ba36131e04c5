"""The processes of worker groups, seen from outside: ending them, and finding out how they ended.

What Ray says of a process that is gone does not tell a crash from a kill, so a worker leaves two more
traces: where its standard error goes (Python's faulthandler writes there), and how many processes the
kernel had killed for lack of memory when it started.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, OutOfMemoryError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hiertune.search.messages import Cause

_ANSWER_S = 5.0
"""How long Ray may take to say what became of a process; one that is alive but busy does not answer."""
_SCENE_S = 20.0
"""How long a look at another node may take; Ray starts a process there."""
_GONE_S = 30.0
"""How long a process that is killed may take to be gone. One that is in the kernel's hands can take longer:
it can't do harm any more, because nothing that it says is heard."""

_FATAL = re.compile(rb"Fatal Python error: ([^\n]+)\n")
_FRAME = re.compile(rb'Current thread 0x\w+[^\n]*\n  File "([^"\n]+)", line (\d+)')
_TAIL_BYTES = 2**18


@dataclass(frozen=True)
class WorkerProcess:
    """One process of a worker group, as it presents itself at its start."""

    rank: int
    size: int
    """Processes of its group."""
    actor: Any
    """Ray's handle of it."""
    node: str
    """Ray's id of its node."""
    host: str
    log: str | None
    """The file on its node that its standard error goes to, where that is known."""
    memory_kills: int | None

    @classmethod
    def this(cls, rank: int, size: int) -> WorkerProcess:
        """The process that calls this, in which a crash is from now on written to standard error."""
        faulthandler.enable(2)
        context = ray.get_runtime_context()
        log = None
        with suppress(OSError):  # there is no /proc everywhere
            log = os.readlink("/proc/self/fd/2")
        return cls(
            rank,
            size,
            context.current_actor,
            context.get_node_id(),
            socket.gethostname(),
            log,
            memory_kills(),
        )

    def __str__(self) -> str:
        return f"worker {self.rank + 1} of {self.size}" if self.size > 1 else "the worker"


def memory_kills(root: Path = Path("/")) -> int | None:
    """How many processes the kernel has killed for lack of memory: in this container, or on this node."""
    for name, key in (("sys/fs/cgroup/memory.events", "oom_kill"), ("proc/vmstat", "oom_kill")):
        with suppress(OSError):
            for line in (root / name).read_text().splitlines():
                word, _, value = line.partition(" ")
                if word == key:
                    return int(value)
    return None


def crash(log: str | None) -> str | None:
    """What faulthandler wrote of the process's end: "Segmentation fault in file.py:12"."""
    if log is None:
        return None
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.path.getsize(log) - _TAIL_BYTES))
            text = file.read()
    except OSError:
        return None
    fatal = list(_FATAL.finditer(text))
    if not fatal:
        return None
    what = fatal[-1][1].decode(errors="replace")
    place = _FRAME.search(text, fatal[-1].end())
    if place is None:
        return what
    return f"{what} in {Path(place[1].decode(errors='replace')).name}:{place[2].decode()}"


def judge(
    process: WorkerProcess, death: BaseException, crash: str | None, memory_kills: int | None
) -> Cause | None:
    """Why a process is gone, from what Ray says of it and what it left. None if Ray was told to end it."""
    said = str(death)
    if "killed by `ray.kill`" in said or "INTENDED_" in said:
        return None
    if isinstance(death, OutOfMemoryError) or "low on memory" in said or "NODE_OUT_OF_MEMORY" in said:
        return Cause("out_of_memory", f"{process} was ended by Ray: {process.host} ran low on memory")
    if isinstance(death, ActorUnavailableError) or "node has died" in said or "node died" in said:
        return Cause("lost", f"{process} is gone with its node {process.host}")
    if crash is not None:
        return Cause("crashed", f"{process} crashed: {crash}")
    if None not in (memory_kills, process.memory_kills) and memory_kills != process.memory_kills:
        return Cause("out_of_memory", f"{process} was killed by the kernel: {process.host} ran out of memory")
    return Cause("crashed", f"{process} was killed (SIGKILL, or an exit without a word)")


class RayProcesses:
    """Processes that are Ray actors. Lives in the broker's actor."""

    async def end(self, processes: list[WorkerProcess]) -> None:
        """Kill them, stopped and stuck ones too; returns when they are gone, or can't be reached."""
        for process in processes:
            ray.kill(process.actor)
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.gather(*map(_gone, processes)), _GONE_S)

    async def cause(self, processes: list[WorkerProcess]) -> Cause | None:
        """What the first of them that was not ended by Ray itself died of; None if there is none."""
        deaths = await asyncio.gather(*map(_death, processes))
        for process, death in zip(processes, deaths, strict=True):
            if death is None or judge(process, death, None, None) is None:
                continue
            return judge(process, death, *await _look(process))
        return None


async def _gone(process: WorkerProcess) -> None:
    while not isinstance(await _death(process), RayError):
        await asyncio.sleep(0.1)


async def _death(process: WorkerProcess) -> RayError | None:
    """What Ray says became of it; None if it lives, or doesn't answer."""
    try:
        await asyncio.wait_for(process.actor.__ray_ready__.remote(), _ANSWER_S)
    except (GetTimeoutError, asyncio.TimeoutError):
        return None
    except RayError as error:
        return error
    return None


def _scene(log: str | None) -> tuple[str | None, int | None]:
    return crash(log), memory_kills()


async def _look(process: WorkerProcess) -> tuple[str | None, int | None]:
    """What the process left on its node."""
    if process.node == ray.get_runtime_context().get_node_id():
        return _scene(process.log)
    there = NodeAffinitySchedulingStrategy(process.node, soft=False)
    look = ray.remote(num_cpus=0)(_scene).options(scheduling_strategy=there)
    try:
        return await asyncio.wait_for(look.remote(process.log), _SCENE_S)
    except (RayError, asyncio.TimeoutError):  # the node has other things to do, or is gone too
        return None, None
