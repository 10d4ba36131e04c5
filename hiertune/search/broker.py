"""The one meeting point of trial actors and worker groups.

Trials and worker groups do not know each other: a trial submits a job and follows its events; any
idle group takes the next job. So Tune may create and drop trial actors as it likes, and a group
that took 15 s to start outlives them all.

Every start of a group's processes is a *generation*, named by a token. A message with another
token comes from processes that are gone and is refused; the job they held is taken up again from
its checkpoint, and epochs that were already reported are not reported twice.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import deque

from hiertune.search.messages import Event, Failed, Finished, Job, Reported, Stopped
from hiertune.train.result import Decision, EpochResult, TrialOutcome


class StaleGeneration(RuntimeError):
    """A message of a worker whose group has been restarted since."""


@dataclasses.dataclass
class _Run:
    """One submission of a job, from `submit` to its last event."""

    job: Job
    events: asyncio.Queue[Event] = dataclasses.field(default_factory=asyncio.Queue)
    decisions: dict[int, asyncio.Future[Decision]] = dataclasses.field(default_factory=dict)
    delivered: int = 0
    """The last epoch whose result was handed to the submitter."""
    losses: int = 0
    """How often the workers were lost in the middle of it."""
    stopped: bool = False
    """The submitter wants no more of it."""
    released: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    """No worker holds it any more."""

    def decision(self, epoch: int) -> asyncio.Future[Decision]:
        future = self.decisions.setdefault(epoch, asyncio.get_running_loop().create_future())
        if self.stopped and not future.done():
            future.set_result(Decision.STOP)
        return future

    def decide(self, decision: Decision) -> None:
        future = self.decision(self.delivered)
        if not future.done():
            future.set_result(decision)

    def stop(self) -> None:
        self.stopped = True
        for future in self.decisions.values():
            if not future.done():
                future.set_result(Decision.STOP)

    def end(self, event: Event) -> None:
        if not self.released.is_set() and not self.stopped:
            self.events.put_nowait(event)
        self.released.set()


@dataclasses.dataclass
class _Group:
    """One worker group, and what its present generation was given to do."""

    token: str | None = None
    world: int = 1
    slots: dict[int, asyncio.Future[_Run | None]] = dataclasses.field(default_factory=dict)
    """The n-th job of this generation; None tells the workers to go home."""
    run: _Run | None = None
    taken: int = 0

    def slot(self, number: int) -> asyncio.Future[_Run | None]:
        return self.slots.setdefault(number, asyncio.get_running_loop().create_future())


class Broker:
    """Hands jobs to worker groups and their events back to whoever submitted them.

    Runs as an asyncio Ray actor (`hiertune.search.pool` starts it). It is plain asyncio, so the
    tests drive it in-process.
    """

    def __init__(self, recycle_after: int | None = None) -> None:
        self._recycle_after = recycle_after
        self._runs: dict[str, _Run] = {}
        self._groups: dict[str, _Group] = {}
        self._waiting: deque[_Run] = deque()
        self._changed = asyncio.Condition()
        self._closed = False
        self._halted = False
        self._broken: str | None = None
        self.generations = 0

    # ---------------------------------------------------------------- the submitter's side

    async def submit(self, job: Job) -> None:
        """Queue `job`. A job that is still alive under the same id is followed, not run twice."""
        old = self._runs.get(job.id)
        if old is not None and not old.stopped:
            return
        if old is not None:
            await old.released.wait()  # a paused job still writes its checkpoint
        run = self._runs[job.id] = _Run(job)
        if self._broken:
            run.end(Failed(self._broken))
            return
        await self._enqueue(run)

    async def advance(self, job_id: str) -> Event:
        """Let the job go on after its last reported epoch, and wait for its next event."""
        run = self._runs[job_id]
        run.decide(Decision.CONTINUE)
        return await run.events.get()

    async def stop(self, job_id: str) -> None:
        """The submitter is done with the job: stop it after the epoch it is in."""
        run = self._runs[job_id]
        run.stop()
        if run in self._waiting:
            self._waiting.remove(run)
            run.released.set()

    async def halt(self) -> None:
        """Until `go_on`, jobs that no worker holds are Stopped: those that wait, and those that come."""
        self._halted = True
        while self._waiting:
            self._waiting.popleft().end(Stopped())

    async def go_on(self) -> None:
        self._halted = False

    async def settle(self) -> None:
        """Nobody follows the jobs any more: stop them, and wait until their checkpoints are saved."""
        for run in self._runs.values():
            if not run.released.is_set():
                run.stop()
        for run in list(self._runs.values()):
            await run.released.wait()

    async def close(self) -> None:
        """No more jobs: every group's workers return as soon as they are idle."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def abort(self, reason: str) -> None:
        """Worker groups can't be started: every job, now and later, fails with `reason`."""
        self._broken = reason
        self._waiting.clear()
        for run in self._runs.values():
            run.end(Failed(reason))

    # ------------------------------------------------------------------- the workers' side

    async def open_generation(self, group_id: str, token: str) -> None:
        """The group's processes (re)started; called by every rank, counted once."""
        group = self._groups.setdefault(group_id, _Group())
        if group.token == token:
            return
        lost = self._lose(group_id)
        group.token, group.slots, group.taken = token, {}, 0
        self.generations += 1
        async with self._changed:
            self._changed.notify_all()  # wakes the waiters of the old generation, so that they leave
        if lost is not None:
            await self._enqueue(lost, first=True)

    async def lost(self, group_id: str) -> None:
        """The group's trainer is gone; another group, or its successor, takes up its job."""
        run = self._lose(group_id)
        if run is not None:
            await self._enqueue(run, first=True)

    async def take(self, group_id: str, token: str, rank: int, number: int) -> Job | None:
        """The `number`-th job of this generation, the same for every rank. None: return home."""
        group = self._current(group_id, token)
        slot = group.slot(number)
        if rank == 0 and not slot.done():
            slot.set_result(await self._next(group, token))
        run = await slot
        self._current(group_id, token)
        return None if run is None else run.job

    async def report(
        self, group_id: str, token: str, rank: int, number: int, result: EpochResult
    ) -> Decision:
        """An epoch is done. Waits for the submitter's decision, the same for every rank."""
        run = self._given(group_id, token, number)
        decision = run.decision(result.epoch)
        if result.last and not decision.done():
            decision.set_result(Decision.CONTINUE)
        if rank == 0 and result.epoch > run.delivered:
            run.delivered = result.epoch
            if not run.stopped:
                run.events.put_nowait(Reported(result))
        return await asyncio.shield(decision)

    async def finish(self, group_id: str, token: str, number: int, outcome: TrialOutcome) -> None:
        """Rank 0 has ended the job. The other ranks may still be about to report its last epoch."""
        self._given(group_id, token, number).end(Finished(outcome))

    async def fail(self, group_id: str, token: str, number: int, reason: str) -> None:
        """Any rank may say so; the first one counts."""
        self._given(group_id, token, number).end(Failed(reason))

    async def served(self, group_id: str) -> int:
        """Jobs taken by the group's last generation."""
        return self._groups.setdefault(group_id, _Group()).taken

    async def progress(self, job_id: str) -> int:
        """The last epoch of the job that was reported."""
        run = self._runs.get(job_id)
        return 0 if run is None else run.delivered

    async def generation_count(self) -> int:
        """Generations opened so far by all groups: 1 per group when nothing was ever restarted."""
        return self.generations

    # ------------------------------------------------------------------------------ inside

    def _current(self, group_id: str, token: str) -> _Group:
        group = self._groups[group_id]
        if group.token != token:
            raise StaleGeneration(f"worker group {group_id} was restarted")
        return group

    def _given(self, group_id: str, token: str, number: int) -> _Run:
        run = self._current(group_id, token).slots[number].result()
        assert run is not None, "a group that was sent home reported"
        return run

    def _lose(self, group_id: str) -> _Run | None:
        """The group's processes are gone. The job they held, if it shall be tried again."""
        group = self._groups.setdefault(group_id, _Group())
        run, group.run, group.token = group.run, None, None
        if run is None or run.released.is_set():
            return None
        if run.stopped:
            run.released.set()
            return None
        run.losses += 1
        if run.losses > run.job.max_retries:
            run.end(Failed(f"lost its workers {run.losses} times"))
            return None
        return run

    async def _enqueue(self, run: _Run, first: bool = False) -> None:
        if self._halted:
            run.end(Stopped())
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
                lambda: self._closed or self._waiting or group.token != token,
            )
            if group.token != token:
                self._changed.notify()  # it was woken for a job that is not for it
                raise StaleGeneration("the worker group was restarted")
            if not self._waiting:
                return None
            group.run = self._waiting.popleft()
            group.taken += 1
            return group.run
