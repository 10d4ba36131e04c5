"""Runs trials for the tests and records what happens; as a script, one of two workers that stay up."""

from __future__ import annotations

import pickle
import sys

import torch
import torch.distributed as dist

from hiertune.train.loop import run_trial
from hiertune.train.result import Decision


class Killed(Exception):
    """Stands in for the process's end: comes out of `report`, which the loop does not guard."""


def record(config, data, *, stop_at=None, kill_at=None, **options) -> dict:
    """Run a trial; its reports, and its outcome or error, and the trained parameters on the first rank."""
    seen = {"reports": [], "outcome": None, "error": None, "parameters": None}

    def report(result):
        seen["reports"].append(result)
        if result.epoch == kill_at:
            raise Killed
        return Decision.STOP if result.epoch == stop_at else Decision.CONTINUE

    def finish(model):
        seen["parameters"] = {name: value.clone() for name, value in model.state_dict().items()}

    try:
        seen["outcome"] = run_trial(config, data, report, finish=finish, **options)
    except Exception as error:  # noqa: BLE001 - whatever it is, the test looks at it
        seen["error"] = error
    return seen


def main(store: str, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size)
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    while True:
        job = pickle.load(sys.stdin.buffer)
        if job is None:
            dist.destroy_process_group()
            return
        config, data, options = job
        pickle.dump(record(config, data, **options), answers)
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
