"""A trial as Ray Tune sees it: a light actor that submits a job and passes its epochs on."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import ray
from ray import tune

from hiertune.search.follower import Follower
from hiertune.search.messages import Event, Failed, Finished, Measured, Reported, Stopped


class TrialActor(tune.Trainable):
    """One epoch of the job per `step`. Holds no resources: the worker groups hold them. It holds no state
    either: when it dies, Tune starts another one, which follows the job that goes on being trained.

    A failure of the trial itself is a *result* (`state: failed`), not an exception: an exception
    would make Tune drop this actor and hide the reason from the ledger.
    """

    def setup(self, config: dict) -> None:
        """Its job is submitted with the first `step`: Tune may give the trial to an idle actor meanwhile."""
        self._begin(config)

    def reset_config(self, new_config: dict) -> bool:
        self._follower.stop()
        self._begin(new_config)
        self._follower.submit()  # at once: no worker group shall wait for Tune
        return True

    def step(self) -> dict:
        event = self._follower.next()
        return {**self._result(event), "incidents": [asdict(incident) for incident in event.incidents]}

    def _result(self, event: Event) -> dict[str, Any]:
        match event:
            case Reported(result):
                # Of a trial that resumes, Tune sees the epoch it is really at.
                self._iteration = result.epoch - 1
                seconds = {"epoch_seconds": result.seconds, "input_seconds": result.input_seconds}
                return {
                    **self._measured({**result.metrics, **seconds}),
                    "state": "completed" if result.last else "running",
                    "notes": result.notes,
                    "done": result.last,
                }
            case Failed(reason, fault):
                return {"state": "failed", "reason": reason, "fault": fault, "done": True}
            case Stopped():
                return {"state": "interrupted", "done": True}
            case Finished(outcome) if outcome.stopped:
                return {"state": "paused", "done": True}
            case Finished(outcome):
                # Only reached when a resumed checkpoint was already complete.
                return {**self._measured(outcome.metrics), "state": "completed", "done": True}

    def cleanup(self) -> None:
        self._follower.stop()

    def _begin(self, config: dict) -> None:
        self._metric: str = config["metric"]
        self._follower = Follower(ray.get_actor(config["broker"]), config["job"])

    def _measured(self, metrics: dict[str, float]) -> dict[str, Any]:
        """Of the metrics Tune sees the objective alone."""
        return {self._metric: metrics[self._metric], "measured": Measured(metrics)}
