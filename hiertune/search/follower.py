"""A submitter's line to the broker: one job, and its events one after another."""

from __future__ import annotations

from typing import Any

import ray

from hiertune.search.broker import UnknownJob
from hiertune.search.messages import Event, Job, Reported


class Follower:
    """Submits `job`, or follows it if it is being trained already, from where another follower had got to.

    One that has asked for nothing has submitted nothing, and stops nothing: another one may have the job.
    """

    def __init__(self, broker: Any, job: Job) -> None:
        self._broker = broker
        self._job = job
        self._after = 0
        self._submitted = False

    def next(self) -> Event:
        """Let the job go on after the epoch that was read last, and wait for its next event."""
        if not self._submitted:
            self.submit()
        while True:
            try:
                event = ray.get(self._broker.advance.remote(self._job.id, self._after))
            except UnknownJob:  # the broker was restarted; the job goes on from its checkpoint
                self.submit()
                continue
            if isinstance(event, Reported):
                self._after = event.result.epoch
            return event

    def submit(self) -> None:
        """Queue the job before its first event is asked for."""
        self._submitted = True
        self._after = ray.get(self._broker.submit.remote(self._job, self._after))

    def stop(self) -> None:
        """No more of it: the job ends after the epoch it is in. Without harm after its end, or twice."""
        if self._submitted:
            ray.get(self._broker.stop.remote(self._job.id))
