"""The one meeting point of trial actors and worker groups.

Trials and worker groups do not know each other: a trial submits a job and follows its events; any
idle group takes the next job. So Tune may create and drop trial actors as it likes, and a group
that took 15 s to start outlives them all.

A submitter reads a job's events with a cursor, the last epoch that it has. Asking for what comes after
an epoch *is* the decision to go on after it, so one who asks twice, or a successor who asks again, changes
nothing.

Every start of a group's processes is a *generation*, named by a token. A message with another
token comes from processes that are gone and is refused; the job they held is taken up again from
its checkpoint, and epochs that were already reported are not reported twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
from bisect import bisect_right
from collections import deque
from pathlib import Path
from typing import Any, Protocol

from hiertune._files import replace_file
from hiertune.search.messages import (
    MENDABLE,
    Cause,
    Event,
    Failed,
    Finished,
    Incident,
    Job,
    Reported,
    Stopped,
)
from hiertune.search.processes import WorkerProcess
from hiertune.train.result import Decision, EpochResult, TrialOutcome

_UNKNOWN = Cause("crashed", "its workers were lost")


class StaleGeneration(RuntimeError):
    """A message of a worker whose group has been restarted since."""


class UnknownJob(RuntimeError):
    """No such job was submitted since this broker started."""


class JobStopped(RuntimeError):
    """The job's submitter has let go of it."""


class Processes(Protocol):
    """What a broker can do to the processes of a group."""

    async def end(self, processes: list[WorkerProcess]) -> None:
        """Kill them; returns when they are gone, or can't be reached."""

    async def cause(self, processes: list[WorkerProcess]) -> Cause | None:
        """How processes that are gone ended, as far as it can be found out."""


@dataclasses.dataclass
class _Run:
    """One submission of a job, from `submit` to its last event."""

    job: Job
    asked: int = 0
    """The submitter has, and agrees to go on after, all epochs up to this one."""
    delivered: int = 0
    """The last epoch that was reported."""
    reported: list[Reported] = dataclasses.field(default_factory=list)
    ending: Finished | Failed | Stopped | None = None
    incidents: list[Incident] = dataclasses.field(default_factory=list)
    """What happened since the last event."""
    notes: dict[str, bool] = dataclasses.field(default_factory=dict)
    """What its workers said, and whether that was passed on."""
    tries: int = 1
    stopped: bool = False
    """The submitter wants no more of it."""
    released: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    """No worker holds it any more."""
    news: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    """Set, and replaced, at whatever somebody may wait for."""

    def tell(self) -> None:
        news, self.news = self.news, asyncio.Event()
        news.set()

    def after(self, epoch: int) -> Event | None:
        """The first event after `epoch`, if it has come."""
        index = bisect_right(self.reported, epoch, key=lambda event: event.result.epoch)
        return self.reported[index] if index < len(self.reported) else self.ending

    def is_done(self, epoch: int) -> bool:
        """Whether no more than `epoch` epochs are wanted."""
        return self.job.until is not None and epoch >= self.job.until

    def decision(self, epoch: int) -> Decision | None:
        """The same for every rank, whenever it asks: what was asked for stays asked for after a stop."""
        if epoch <= self.asked:
            return Decision.STOP if self.is_done(epoch) else Decision.CONTINUE
        return Decision.STOP if self.stopped or self.ending is not None else None

    def add(self, result: EpochResult) -> None:
        for note in result.notes:  # also those of a repeated epoch; what each try says is said once
            self.notes.setdefault(note, False)
        if result.epoch > self.delivered and not self.released.is_set():
            self.delivered = result.epoch
            notes = tuple(note for note, said in self.notes.items() if not said)
            self.notes = dict.fromkeys(self.notes, True)
            result = dataclasses.replace(result, notes=notes)
            self.reported.append(Reported(result, self._incidents()))
            self.tell()

    def end(self, event: Finished | Failed | Stopped) -> None:
        """Only the first ending counts."""
        if not self.released.is_set():
            self.ending = dataclasses.replace(event, incidents=self._incidents())
            self.release()

    def release(self) -> None:
        self.released.set()
        self.tell()

    def survive(self, cause: Cause) -> bool:
        """Note what befell it. False if that was the end: there is no try left.

        A node that is lost is nothing that the job could have caused: that try is not counted.
        """
        if cause.fault != "lost" and self.tries > self.job.max_retries:
            given_up = f" (given up after {self.tries} attempts)" if self.tries > 1 else ""
            self.end(Failed(cause.reason + given_up, cause.fault))
            return False
        self.tries += cause.fault != "lost"
        self.incidents.append(Incident(cause.fault, cause.reason, self.delivered, time.time()))
        return True

    def _incidents(self) -> tuple[Incident, ...]:
        incidents, self.incidents = tuple(self.incidents), []
        return incidents


@dataclasses.dataclass
class _Group:
    """One worker group, and what its present generation was given to do."""

    token: str | None = None
    processes: dict[int, WorkerProcess] = dataclasses.field(default_factory=dict)
    """By rank."""
    slots: dict[int, asyncio.Future[_Run | None]] = dataclasses.field(default_factory=dict)
    """The n-th job of this generation; None tells the workers to go home."""
    run: _Run | None = None
    taken: int = 0
    cause: Cause | None = None
    """What this generation comes to its end by, where that is known before its processes are gone."""
    hint: Cause | None = None
    """What it may have come to its end by."""
    progress: dict[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """By rank how far it is, as far as it told."""
    moved: float = 0.0
    """When a worker last got on (`time.monotonic`)."""
    undecided: bool = False
    """The first worker waits for the submitter's decision: nobody hangs then. (Others may wait for it.)"""
    watch: asyncio.Task[None] | None = None
    mending: asyncio.Task[None] | None = None
    """The generation before is being looked into, and its job queued again."""

    def slot(self, number: int) -> asyncio.Future[_Run | None]:
        return self.slots.setdefault(number, asyncio.get_running_loop().create_future())

    def start(self, token: str | None) -> None:
        self.token, self.slots, self.taken = token, {}, 0
        self.processes, self.progress, self.undecided = {}, {}, False

    def leave(self) -> tuple[_Run | None, Cause | None, Cause | None]:
        """The processes are gone, or shall be: what they held; and why, if that is known, or guessed."""
        run, cause, hint = self.run, self.cause, self.hint
        self.token = self.run = self.cause = self.hint = None
        if self.watch is not None and self.watch is not asyncio.current_task():
            self.watch.cancel()
        self.watch = None
        return run, cause, hint


@dataclasses.dataclass(frozen=True)
class _Orders:
    """What the pool has told: it tells it once, and it holds also when Ray has restarted the broker."""

    halted: bool = False
    """Jobs that no worker holds are Stopped."""
    closed: bool = False
    """Idle workers go home."""
    broken: str | None = None
    """Why every job fails."""


class Broker:
    """Hands jobs to worker groups and their events back to whoever submitted them.

    Runs as an asyncio Ray actor (`hiertune.search.pool` starts it). It is plain asyncio, so the
    tests drive it in-process.

    Args:
        recycle_after: jobs after which a group is replaced.
        orders: file for what a broker that takes this one's place has to know. Jobs and groups are not in
            it: those who have them come to it anew.
    """

    def __init__(
        self,
        recycle_after: int | None = None,
        processes: Processes | None = None,
        orders: Path | None = None,
    ) -> None:
        self._recycle_after = recycle_after
        self._processes = processes
        self._file = orders
        self._orders = _Orders()
        if orders is not None and orders.exists():
            self._orders = _Orders(**json.loads(orders.read_bytes()))
        self._runs: dict[str, _Run] = {}
        self._groups: dict[str, _Group] = {}
        self._waiting: deque[_Run] = deque()
        self._changed = asyncio.Condition()
        self.generations = 0

    # ---------------------------------------------------------------- the submitter's side

    async def submit(self, job: Job, after: int = 0) -> int:
        """Queue `job`, of which the submitter has the epochs up to `after`. Returns where to read on.

        A job that is still alive under the same id is followed, not run twice: from where whoever
        followed it before had got to.
        """
        while (old := self._runs.get(job.id)) is not None:
            if not old.stopped:
                return max(after, old.asked)
            await old.released.wait()  # a job that was stopped still writes its checkpoint
            if self._runs.get(job.id) is old:
                del self._runs[job.id]
        run = self._runs[job.id] = _Run(job, asked=after, delivered=after)
        if self._orders.broken is not None:
            run.end(Failed(self._orders.broken, "not_started"))
        else:
            await self._enqueue(run)
        return after

    async def advance(self, job_id: str, after: int) -> Event:
        """The first event after epoch `after`; to ask for it is the decision to go on after `after`.

        Raises UnknownJob, and JobStopped also while it waits.
        """
        run = self._runs.get(job_id)
        if run is None:
            raise UnknownJob(job_id)
        if after > run.asked and not run.stopped:
            run.asked = after
            run.tell()
        while True:
            if run.stopped:
                raise JobStopped(job_id)
            if (event := run.after(after)) is not None:
                return event
            await run.news.wait()

    async def stop(self, job_id: str) -> None:
        """The submitter is done with the job: stop it after the epoch it is in, and forget it."""
        run = self._runs.get(job_id)
        if run is None or run.stopped:
            return
        run.stopped = True
        run.tell()
        if run in self._waiting:
            self._waiting.remove(run)
            run.release()
        if run.released.is_set():
            del self._runs[job_id]

    async def halt(self) -> None:
        """Until `go_on`, jobs that no worker holds are Stopped: those that wait, and those that come."""
        self._order(halted=True)
        while self._waiting:
            self._waiting.popleft().end(Stopped())

    async def go_on(self) -> None:
        self._order(halted=False)

    async def settle(self) -> None:
        """Nobody follows the jobs any more: stop them, and wait until their checkpoints are saved."""
        runs = dict(self._runs)
        for job_id in runs:
            await self.stop(job_id)
        for run in runs.values():
            await run.released.wait()

    async def close(self) -> None:
        """No more jobs: every group's workers return as soon as they are idle."""
        async with self._changed:
            self._order(closed=True)
            self._changed.notify_all()

    async def abort(self, reason: str) -> None:
        """Worker groups can't be started: every job, now and later, fails with `reason`."""
        self._order(broken=reason)
        self._waiting.clear()
        for run in self._runs.values():
            run.end(Failed(reason, "not_started"))

    # ------------------------------------------------------------------- the workers' side

    async def open_generation(self, group_id: str, token: str, process: WorkerProcess | None = None) -> None:
        """The group's processes (re)started; called by every rank, counted once.

        Returns when the job that its last generation held is queued again.
        """
        group = self._groups.setdefault(group_id, _Group())
        if group.token != token:
            self._mend(group)
            group.start(token)
            self.generations += 1
            async with self._changed:
                self._changed.notify_all()  # wakes the waiters of the old generation, so that they leave
        if process is not None:
            group.processes[process.rank] = process
        if group.mending is not None:
            await asyncio.shield(group.mending)

    async def lost(self, group_id: str) -> None:
        """The group's trainer is gone; another group, or its successor, takes up its job."""
        group = self._groups.setdefault(group_id, _Group())
        self._mend(group)
        if group.mending is not None:
            await asyncio.shield(group.mending)

    async def take(self, group_id: str, token: str, rank: int, number: int) -> Job | None:
        """The `number`-th job of this generation, the same for every rank. None: return home."""
        group = self._current(group_id, token)
        slot = group.slot(number)
        if rank == 0 and not slot.done():
            run = await self._next(group, token)
            group.slots = {n: slot for n, slot in group.slots.items() if n >= number - 1}
            slot.set_result(run)
        run = await slot
        self._current(group_id, token)
        return None if run is None else run.job

    async def beat(self, group_id: str, token: str, rank: int, progress: tuple[int, ...]) -> None:
        """A worker got on; `progress` grows with each batch. Nobody waits for the answer."""
        group = self._groups.get(group_id)
        if group is not None and group.token == token:
            group.progress[rank], group.moved = progress, time.monotonic()

    async def report(
        self, group_id: str, token: str, rank: int, number: int, result: EpochResult
    ) -> Decision:
        """An epoch is done. Waits for the submitter's decision, the same for every rank."""
        run = self._given(group_id, token, number)
        group = self._groups[group_id]
        if rank == 0:
            run.add(result)
        if result.last:
            return Decision.CONTINUE
        group.undecided |= rank == 0
        while (decision := run.decision(result.epoch)) is None:
            await run.news.wait()
            self._current(group_id, token)
        group.undecided &= rank != 0
        group.moved = time.monotonic()
        return decision

    async def finish(self, group_id: str, token: str, number: int, outcome: TrialOutcome) -> None:
        """Rank 0 has ended the job. The other ranks may still be about to report its last epoch."""
        self._let_go(self._given(group_id, token, number), Finished(outcome))

    async def fail(self, group_id: str, token: str, number: int, cause: Cause) -> None:
        """Any rank may say so; the first one counts. What another try can mend waits for the restart."""
        run = self._given(group_id, token, number)
        group = self._groups[group_id]
        if cause.fault not in MENDABLE:
            self._let_go(run, Failed(cause.reason, cause.fault))
        elif group.cause is None:
            group.cause = cause

    async def broken(self, group_id: str, token: str, reason: str) -> None:
        """A worker lost its connection to another one: a cause only where none better is found."""
        group = self._current(group_id, token)
        group.hint = group.hint or Cause("crashed", reason)

    async def served(self, group_id: str) -> int:
        """Jobs taken by the group's last generation."""
        return self._groups.setdefault(group_id, _Group()).taken

    async def progress(self, job_id: str) -> int:
        """The last epoch of the job that was reported."""
        run = self._runs.get(job_id)
        return 0 if run is None else run.delivered

    async def jobs(self) -> list[str]:
        """The jobs that a submitter holds, or that workers have not let go of."""
        return list(self._runs)

    async def generation_count(self) -> int:
        """Generations opened so far by all groups: 1 per group when nothing was ever restarted."""
        return self.generations

    # ------------------------------------------------------------------------------ inside

    def _order(self, **changes: Any) -> None:
        """Written down before it is answered: of a broker that is killed before that, Ray asks it again."""
        self._orders = dataclasses.replace(self._orders, **changes)
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk: this broker knows, its successor won't
                self._file.parent.mkdir(parents=True, exist_ok=True)
                replace_file(self._file, json.dumps(dataclasses.asdict(self._orders)).encode())

    def _current(self, group_id: str, token: str) -> _Group:
        group = self._groups.get(group_id)
        if group is None or group.token != token:
            raise StaleGeneration(f"worker group {group_id} was restarted")
        return group

    def _given(self, group_id: str, token: str, number: int) -> _Run:
        run = self._current(group_id, token).slots[number].result()
        assert run is not None, "a group that was sent home reported"
        return run

    def _let_go(self, run: _Run, event: Finished | Failed | None = None) -> None:
        """No worker holds the job any more; forget it, if nobody wants to hear of it."""
        if event is None or run.stopped:
            run.release()
        else:
            run.end(event)
        if run.stopped and self._runs.get(run.job.id) is run:
            del self._runs[run.job.id]

    def _mend(self, group: _Group) -> None:
        """The group's processes are gone: see to the job that they held."""
        processes = list(group.processes.values())
        run, cause, hint = group.leave()
        if run is None or run.released.is_set():
            return
        run.tell()  # whoever of them still waits for a decision leaves
        if run.stopped:
            self._let_go(run)
            return
        group.mending = asyncio.create_task(self._retry(run, cause, hint, processes))

    async def _retry(
        self, run: _Run, cause: Cause | None, hint: Cause | None, processes: list[WorkerProcess]
    ) -> None:
        if cause is None and self._processes is not None:
            cause = await self._processes.cause(processes)
        if run.stopped:
            self._let_go(run)
        elif not run.released.is_set() and run.survive(cause or hint or _UNKNOWN):
            await self._enqueue(run, first=True)

    async def _enqueue(self, run: _Run, first: bool = False) -> None:
        if self._orders.halted:
            run.end(Stopped())
            return
        if run.is_done(run.asked):  # its workers were lost as they saved it: another job repeats some epochs
            run.end(Finished(TrialOutcome(run.asked, stopped=True, metrics={})))
            return
        async with self._changed:
            if first:
                self._waiting.appendleft(run)
            else:
                self._waiting.append(run)
            self._changed.notify()

    async def _next(self, group: _Group, token: str) -> _Run | None:
        if self._recycle_after is not None and group.taken >= self._recycle_after:
            return None
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._orders.closed or self._waiting or group.token != token,
            )
            if group.token != token:
                self._changed.notify()  # it was woken for a job that is not for it
                raise StaleGeneration("the worker group was restarted")
            if not self._waiting:
                return None
            run = group.run = self._waiting.popleft()
        group.taken += 1
        group.moved = time.monotonic()
        if group.watch is not None:
            group.watch.cancel()
        group.watch = asyncio.create_task(self._watch(group, run))
        return run

    async def _watch(self, group: _Group, run: _Run) -> None:
        """End the group's processes if they hold the job and don't get on."""
        limit = run.job.hang_timeout
        while not run.released.is_set():
            idle = 0.0 if group.undecided else time.monotonic() - group.moved
            if idle < limit:
                await asyncio.sleep(limit - idle)
                continue
            cause = Cause("hang", f"no batch for {idle:.0f} s at epoch {run.delivered + 1}{_who(group)}")
            if self._processes is not None:
                processes = list(group.processes.values())
                # One that is gone, which Ray Train has not noticed yet, explains that the others wait.
                cause = await self._processes.cause(processes) or cause
                group.cause = group.cause or cause
                await self._processes.end(processes)
            group.cause = group.cause or cause
            if group.run is run:
                self._mend(group)
            return


def _who(group: _Group) -> str:
    """The worker that is behind, if it is one: the others wait for it in a collective."""
    progress = {rank: group.progress.get(rank, ()) for rank in group.processes}
    behind = [rank for rank, far in progress.items() if far == min(progress.values())]
    return f" (worker {behind[0] + 1} of {len(progress)})" if len(behind) == 1 < len(progress) else ""
