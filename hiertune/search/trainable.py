"""A trial as Ray Tune sees it: a light actor that submits a job and passes its epochs on."""

from __future__ import annotations

from typing import Any

import ray
from ray import tune

from hiertune.search.messages import Failed, Finished, Job, Measured, Reported


class TrialActor(tune.Trainable):
    """One epoch of the job per `step`. Holds no resources: the worker groups hold them.

    A failure of the trial itself is a *result* (`state: failed`), not an exception: an exception
    would make Tune drop this actor and hide the reason from the ledger.
    """

    def setup(self, config: dict) -> None:
        self._begin(config)

    def reset_config(self, new_config: dict) -> bool:
        self._let_go()
        self._begin(new_config)
        return True

    def step(self) -> dict:
        event = ray.get(self._broker.advance.remote(self._job.id))
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
            case Failed(reason):
                return {"state": "failed", "reason": reason, "done": True}
            case Finished():
                # Only reached when a resumed checkpoint was already complete.
                return {**self._measured(event.outcome.metrics), "state": "completed", "done": True}
        raise AssertionError(event)

    def cleanup(self) -> None:
        self._let_go()

    def save_checkpoint(self, checkpoint_dir: str) -> dict:
        """Tune pauses the trial (Hyperband): the job ends after its epoch and keeps its own checkpoint."""
        self._let_go()
        return {"epoch": self.iteration}

    def load_checkpoint(self, checkpoint: dict | None) -> None:
        """The job resumed from its own checkpoint when it was submitted again."""

    def _begin(self, config: dict) -> None:
        self._broker = ray.get_actor(config["broker"])
        self._job: Job = config["job"]
        self._metric: str = config["metric"]
        ray.get(self._broker.submit.remote(self._job))
        self._holds_job = True

    def _measured(self, metrics: dict[str, float]) -> dict[str, Any]:
        """Of the metrics Tune sees the objective alone."""
        return {self._metric: metrics[self._metric], "measured": Measured(metrics)}

    def _let_go(self) -> None:
        """Stop the job, once: a paused one may go on under another actor by the time this one is reset."""
        if self._holds_job:
            self._holds_job = False
            ray.get(self._broker.stop.remote(self._job.id))
