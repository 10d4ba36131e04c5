"""Runs trials for the tests and records what happens; as a script, one of two workers that stay up."""

from __future__ import annotations

import contextlib
import pickle
import sys
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from hiertune.models import build_model
from hiertune.train.loop import run_trial
from hiertune.train.result import Decision


class Killed(Exception):
    """Stands in for the process's end: comes out of `report`, which the loop does not guard."""


class Spare(nn.Module):
    """A backbone beside which stands a layer that no input passes."""

    def __init__(self, backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.spare = nn.Linear(2, 3)
        self.out_features = backbone.out_features

    @property
    def last_shared_weight(self):
        return self.backbone.last_shared_weight

    def forward(self, x):
        return self.backbone(x)


@contextlib.contextmanager
def spare_layer(noticed: bool):
    """All models get a `Spare` backbone."""

    def build(*args):
        model = build_model(*args)
        model.backbone = Spare(model.backbone)
        return model

    with mock.patch("hiertune.train.build.build_model", build), contextlib.ExitStack() as stack:
        if not noticed:
            stack.enter_context(mock.patch("hiertune.train.trial.may_leave_unused", return_value=False))
        yield


def record(config, data, *, stop_at=None, kill_at=None, spare=None, **options) -> dict:
    """Run a trial; its reports, and its outcome or error, and the trained parameters on the first rank.

    `spare`: with a layer that is not used, "noticed" or "unnoticed".
    """
    seen = {"reports": [], "outcome": None, "error": None, "parameters": None}

    def report(result):
        seen["reports"].append(result)
        if result.epoch == kill_at:
            raise Killed
        return Decision.STOP if result.epoch == stop_at else Decision.CONTINUE

    def finish(model):
        seen["parameters"] = {name: value.clone() for name, value in model.state_dict().items()}

    around = spare_layer(spare == "noticed") if spare else contextlib.nullcontext()
    try:
        with around:
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
