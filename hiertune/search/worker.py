"""What the DDP processes of a worker group do: take a job, train it, report, take the next."""

from __future__ import annotations

import errno
import functools
import logging
import socket
import tempfile
import threading
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.exceptions import RayError

from hiertune.config import DataConfig, TrialConfig
from hiertune.data import HierarchicalDataset, open_dataset
from hiertune.decoding import DecodingRule
from hiertune.export import save_trained
from hiertune.models import HierarchicalClassifier
from hiertune.search.messages import Cause, Job, WorkerSetup
from hiertune.search.processes import WorkerProcess
from hiertune.storage import Folder, LocalFolder, patiently
from hiertune.train.checkpoint import Checkpoint
from hiertune.train.loop import run_trial
from hiertune.train.result import Decision, EpochResult, TrialFailed

logger = logging.getLogger(__name__)

_HEARTBEAT_S = 30.0
"""How often a worker that gets on says so, at the least often."""
_REASON_CHARACTERS = 500
"""Of an exception's text so much is a reason, in one line; the worker's log has all of it."""


def work(config: dict) -> None:
    """The `train_loop_per_worker` of a group's TorchTrainer: runs until the broker says go home."""
    setup: WorkerSetup = config["setup"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    link = _Link(setup.broker, setup.group, _agree_on_token(), rank)
    link.call("open_generation", WorkerProcess.this(rank, context.get_world_size()))
    while (job := link.call("take", rank, link.number)) is not None:
        with link.heartbeat(job.hang_timeout):
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
            beat=link.beat,
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
            link.call("fail", link.number, Cause("diverged", error.reason))
        return
    except _NotSaved as error:  # by the first rank, after all that the ranks do together
        link.call("fail", link.number, Cause("error", str(error)))
        return
    except RayError:  # the broker refuses this process, or is gone: a new generation goes on
        raise
    except Exception as error:
        # One rank's exception may leave the others inside a collective: tell why, then fall, so
        # that Ray Train replaces the whole group. A broken connection has no reason to tell: another
        # rank is gone, and the trial goes on from its checkpoint.
        logger.exception("job %s failed", job.id)
        if _lost_a_peer(error):
            link.call("broken", f"a connection between its workers broke: {str(error).splitlines()[0]}")
        else:
            link.call("fail", link.number, _cause(error))
        raise
    if link.rank == 0:
        if job.export:
            Checkpoint(checkpoint).remove()  # the model is saved; a trial's goes when its end is told
        link.call("finish", link.number, outcome)


class _NotSaved(Exception):
    """The trained model can't be written."""


def _export(
    folder: Folder, model: HierarchicalClassifier, config: TrialConfig, data: HierarchicalDataset
) -> None:
    """Write the model to `model/` in the folder; to one that is not on this disk from a temporary place."""
    try:
        if isinstance(folder, LocalFolder):
            save_trained(folder.path / "model", model, config, data)
            return
        with tempfile.TemporaryDirectory(prefix="hiertune-") as here:
            save_trained(here, model, config, data)
            patiently(folder.upload, Path(here), "model")
    except OSError as error:
        raise _NotSaved(f"the model could not be saved in {folder}: {error.strerror or error}") from error


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


def _cause(error: Exception) -> Cause:
    if isinstance(error, torch.OutOfMemoryError):
        return Cause("out_of_memory", f"out of memory on the GPU: {str(error).split('. ')[0]}")
    no_memory = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or no_memory or "can't allocate memory" in str(error):
        return Cause("out_of_memory", f"out of memory on {socket.gethostname()} ({_place(error)})")
    text = shorten(str(error), _REASON_CHARACTERS, placeholder=" ...")
    return Cause("error", f"{type(error).__name__}: {text} ({_place(error)})")


def _place(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(last.filename).name}:{last.lineno}"


@dataclass
class _Link:
    """This worker's line to the broker."""

    broker: ray.actor.ActorHandle
    group: str
    token: str
    rank: int
    number: int = 0
    """Which job of this generation it is at."""
    progress: tuple[int, int, int] = (0, 0, 0)
    """Jobs, epochs and batches that it has begun; a larger one is further."""

    def call(self, method: str, *args):
        return ray.get(getattr(self.broker, method).remote(self.group, self.token, *args))

    def report(self, result: EpochResult) -> Decision:
        decision = self.call("report", self.rank, self.number, result)
        self.progress = (self.number, result.epoch, 0)
        return decision

    def beat(self) -> None:
        """A batch is trained or evaluated."""
        number, epoch, batches = self.progress
        self.progress = (number, epoch, batches + 1)

    @contextmanager
    def heartbeat(self, hang_timeout: float) -> Iterator[None]:
        """Meanwhile the broker hears, several times within `hang_timeout` seconds, that batches are done."""
        over = threading.Event()
        self.progress = (self.number, 0, 0)

        def tell() -> None:
            told = None
            while not over.wait(min(hang_timeout / 5, _HEARTBEAT_S)):
                if (now := self.progress) != told:
                    self.broker.beat.remote(self.group, self.token, self.rank, now)
                    told = now

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
