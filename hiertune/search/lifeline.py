"""What becomes of a search when Ray dies under it.

Measured with Ray 2.60, by SIGKILL in the middle of a search:

- a worker, a Train controller, the broker (Ray starts it again), another node: the search goes on by itself;
- the raylet of the driver's node: the driver goes on for some 13 s, until Ray calls the node dead; then, at
  its next touch of the object store, Ray's native code ends the process, with code 1 and no Python exception;
- the GCS: training stands still at once, calls hang, and after 60 s native code ends the process likewise;
- the broker for good, so that Ray can't start it again: every trial actor ends with `ActorDiedError`.

A driver that has lost Ray can't clean up either: what would do it hangs, or is ended in the middle. So it is
left as SIGKILL would leave it, which ledger, spool and checkpoints are made for, and the same process begins
anew, as after `--resume`, by `exec`: its process id, terminal and job stay.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import psutil
import ray
from ray.exceptions import ActorDiedError, RayError

from hiertune._process import end_families
from hiertune.config import TrialConfig
from hiertune.search import cluster
from hiertune.search.ledger import TrialRecord

logger = logging.getLogger(__name__)

_LOOK_S = 1.0
_GCS_PATIENCE_S = 40.0
"""How long a GCS that others keep may be away (KubeRay restarts it); below the 60 s of Ray's native code."""
_ATTEMPTS = 3
"""Beginnings in a row in which no epoch is trained, until the search gives up."""
_ATTEMPT = "HIERTUNE_ATTEMPT"
"""Environment variable: how many there were."""


def attempt() -> int:
    """How often this search began anew since its last trained epoch."""
    return int(os.environ.get(_ATTEMPT, "0"))


class Lifeline:
    """Watches Ray from threads of its own; where Ray is lost, `check` and they do not return.

    Args:
        command: begins this process anew, with the program as first word; None: it ends instead.
        last_words: how to go on by hand.
        own_ray: this process starts Ray itself, so that nobody else will mend it.
        stopping: whether the user has asked the search to stop; then it is not begun anew.
    """

    def __init__(
        self,
        command: list[str] | None,
        last_words: str,
        own_ray: bool,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._command = command
        self._last_words = last_words
        self._own_ray = own_ray
        self._gcs_patience = 0.0 if own_ray else _GCS_PATIENCE_S
        self._stopping = stopping
        self._environment = dict(os.environ)  # before Ray adds to it
        self._lived = False
        self._places: dict[str, tuple[str, int]] = {}
        self._broker: Any = None
        self._closed = threading.Event()
        self._leaving = threading.Lock()

    def watch_start(self) -> None:
        """Begin to watch the Ray that this process is about to start, if it does: by its child processes."""
        if self._own_ray:
            threading.Thread(target=self._look_at_children, daemon=True).start()

    def watch(self) -> None:
        """Begin to watch the Ray that this process has joined."""
        here = ray.get_runtime_context().get_node_id()
        node = next(node for node in ray.nodes() if node["NodeID"] == here)
        gcs_host, _, gcs_port = ray.get_runtime_context().gcs_address.rpartition(":")
        self._places = {
            "raylet": (node["NodeManagerAddress"], node["NodeManagerPort"]),
            "gcs": (gcs_host.strip("[]"), int(gcs_port)),
        }
        for look in (self._check_places, self._check_broker):
            cluster.thread(self._repeat, look).start()

    def hold(self, broker: Any) -> None:
        """Watch this actor too; None: no more."""
        self._broker = broker

    def close(self) -> None:
        """Whatever becomes of Ray now is meant."""
        self._closed.set()

    def check(self) -> None:
        """Return where Ray is well: then what went wrong has another cause."""
        if not self._closed.is_set():
            self._check_places()
            self._check_broker()

    def progressed(self) -> None:
        """An epoch was trained."""
        self._lived = True

    # As a listener it hears of the trials' epochs.

    def trial_started(self, number: int, config: TrialConfig, params: dict) -> None: ...

    def trial_reported(self, number: int, epoch: int, metrics: dict[str, float]) -> None:
        self.progressed()

    def trial_ended(self, record: TrialRecord) -> None: ...

    # ------------------------------------------------------------------------------ inside

    def _look_at_children(self) -> None:
        """Until Ray has started. (Its native code would wait for a head that is gone for a minute, and then
        end the process without a word.)"""
        seen: set[psutil.Process] = set()
        while not self._places and not self._closed.wait(_LOOK_S):
            alive = {child for child in psutil.Process().children() if _is_of_ray(child)}
            if seen - alive:
                self._leave("Ray died while it started")
            seen |= alive

    def _repeat(self, look: Callable[[], None]) -> None:
        while not self._closed.wait(_LOOK_S):
            look()

    def _check_places(self) -> None:
        if not self._places:
            return
        if not _listens(self._places["raylet"], patience_s=2.0):
            self._leave("the Ray node of this machine died")
        if not _listens(self._places["gcs"], patience_s=max(2.0, self._gcs_patience)):
            self._leave("Ray's head (its GCS) is gone")

    def _check_broker(self) -> None:
        broker = self._broker
        if broker is None:
            return
        try:
            ray.get(broker.generation_count.remote(), timeout=10.0)
        except ActorDiedError:
            if self._broker is not None:
                self._leave("the actor that hands out the trials died")
        except RayError:
            return  # it is busy, or what it runs on is lost: the other look tells

    def _leave(self, reason: str) -> None:
        self._leaving.acquire()  # for good: one thread leaves for all
        if self._closed.is_set():
            self._leaving.release()
            return
        again = 1 if self._lived else attempt() + 1
        logger.warning("%s", reason)
        if self._command is None or self._stopping() or again > _ATTEMPTS:
            text = f"\n{reason}; go on with:\n  {self._last_words}\n"
            end_families(psutil.Process().children())
            _say(text)
            os._exit(1)
        _say(f"\n{reason}; the search begins anew from its ledger\n")
        end_families(psutil.Process().children())  # its successor would take them for its own
        _begin_anew(self._command, self._environment | {_ATTEMPT: str(again)})


def _is_of_ray(process: psutil.Process) -> bool:
    try:
        return process.name() in ("gcs_server", "raylet") and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _listens(place: tuple[str, int], patience_s: float) -> bool:
    """Whether somebody accepts connections there, now or within `patience_s`."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            socket.create_connection(place, timeout=5.0).close()
        except TimeoutError:
            if time.monotonic() > deadline + 30.0:  # a machine under load is slow to answer
                return False
        except OSError:
            if time.monotonic() > deadline:
                return False
        else:
            return True
        time.sleep(0.2)


def _say(text: str) -> None:
    """To the terminal, past a display that may be stuck; its cursor comes back."""
    with contextlib.suppress(OSError):
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")
        os.write(2, text.encode())


def _begin_anew(command: list[str], environment: dict[str, str]) -> NoReturn:
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        if int(name) > 2:
            with contextlib.suppress(OSError):  # the listing's own is gone already
                os.set_inheritable(int(name), False)  # sockets of Ray's native code
    sys.stdout.flush()
    os.execve(command[0], command, environment)  # nosec B606 - this program's own command line
