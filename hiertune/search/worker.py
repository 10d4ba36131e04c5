"""What the DDP processes of a worker group do: take a job, train it, report, take the next."""

from __future__ import annotations

import functools
import logging
import tempfile
import traceback
import uuid
from dataclasses import dataclass
from pathlib import Path

import ray
import ray.train
import torch.distributed as dist

from hiertune.config import DataConfig, TrialConfig
from hiertune.data import HierarchicalDataset, open_dataset
from hiertune.decoding import DecodingRule
from hiertune.export import save_trained
from hiertune.models import HierarchicalClassifier
from hiertune.search.messages import Job, WorkerSetup
from hiertune.storage import Folder, LocalFolder, patiently
from hiertune.train.checkpoint import Checkpoint
from hiertune.train.loop import run_trial
from hiertune.train.result import Decision, EpochResult, TrialFailed

logger = logging.getLogger(__name__)


def work(config: dict) -> None:
    """The `train_loop_per_worker` of a group's TorchTrainer: runs until the broker says go home."""
    setup: WorkerSetup = config["setup"]
    rank = ray.train.get_context().get_world_rank()
    link = _Link(setup.broker, setup.group, _agree_on_token(), rank)
    link.call("open_generation")
    while (job := link.call("take", rank, link.number)) is not None:
        _train(job, link)
        link.number += 1


def _train(job: Job, link: _Link) -> None:
    """Train one job. This is the only place where what goes wrong in a trial becomes its state."""
    folder = Folder.at(job.folder)
    checkpoint = str(folder.child("checkpoint"))
    try:
        data = _dataset(job.config.data)
        outcome = run_trial(
            job.config,
            data,
            link.report,
            fit_on=job.fit_on,
            validate_on=job.validate_on,
            test_on=job.test_on,
            rules=[DecodingRule.model_validate(rule) for rule in job.rules],
            checkpoint=checkpoint,
            keep_logits=job.keep_logits,
            finish=(lambda model: _export(folder, model, job.config, data)) if job.export else None,
        )
    except TrialFailed as error:  # raised by all ranks together: the group is sound
        if link.rank == 0:
            link.call("fail", link.number, error.reason)
        return
    except Exception as error:
        # One rank's exception may leave the others inside a collective: tell why, then fall, so
        # that Ray Train replaces the whole group. A broken connection has no reason to tell: another
        # rank is gone, and the trial goes on from its checkpoint.
        logger.exception("job %s failed", job.id)
        if not _lost_a_peer(error):
            link.call("fail", link.number, _reason(error))
        raise
    if link.rank == 0:
        if job.export:
            Checkpoint(checkpoint).remove()  # the model is saved; a trial's goes when its end is told
        link.call("finish", link.number, outcome)


def _export(
    folder: Folder, model: HierarchicalClassifier, config: TrialConfig, data: HierarchicalDataset
) -> None:
    """Write the model to `model/` in the folder; to one that is not on this disk from a temporary place."""
    if isinstance(folder, LocalFolder):
        save_trained(folder.path / "model", model, config, data)
        return
    with tempfile.TemporaryDirectory(prefix="hiertune-") as here:
        save_trained(here, model, config, data)
        patiently(folder.upload, Path(here), "model")


@functools.lru_cache(maxsize=2)
def _dataset(config: DataConfig) -> HierarchicalDataset:
    """Opened once per worker process and kept while trials use the same data."""
    return open_dataset(config)


def _agree_on_token() -> str:
    """A name for this start of the group, the same on every rank."""
    token = [uuid.uuid4().hex]
    if dist.is_initialized():
        dist.broadcast_object_list(token, src=0)
    return token[0]


def _lost_a_peer(error: Exception) -> bool:
    """Whether a collective failed because another worker is gone. Gloo says so in words only."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo", "NCCL"))
    )


def _reason(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"


@dataclass
class _Link:
    """This worker's line to the broker."""

    broker: ray.actor.ActorHandle
    group: str
    token: str
    rank: int
    number: int = 0
    """Which job of this generation it is at."""

    def call(self, method: str, *args):
        return ray.get(getattr(self.broker, method).remote(self.group, self.token, *args))

    def report(self, result: EpochResult) -> Decision:
        return self.call("report", self.rank, self.number, result)
