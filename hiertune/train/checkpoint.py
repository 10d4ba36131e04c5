"""Checkpoints that survive a kill at any instant, on a disk or in an object store.

Two files are written by turns, so that the one before stays as it is while a new one comes to be. Each
starts with a number that says which is newer, and a checksum that says whether it is whole. No file is
renamed or copied, which object stores do badly: a checkpoint is one request there.
"""

from __future__ import annotations

import contextlib
import io
import logging
import time
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from hiertune.errors import InputError
from hiertune.storage import Folder, patiently

logger = logging.getLogger(__name__)

_MAGIC = b"hiertune-checkpoint-2\n"
_NUMBER_BYTES, _DIGEST_BYTES = 8, 4
_HEADER_BYTES = len(_MAGIC) + _NUMBER_BYTES + _DIGEST_BYTES
_MOST = 1 << 62
"""No training saves so often: a larger number is a damaged one, and leaves none for the next."""


class Checkpoint:
    """The newest state of one trial, and the one before it."""

    def __init__(self, address: str | Path) -> None:
        """`address`: the path or URI of the first of its two files."""
        self._folder, name = Folder.of_file(address)
        self._names = (name, f"{name}.other")
        self._last: tuple[int, str] | None = None
        """Number and name of the newest, once that is known."""

    def __str__(self) -> str:
        return str(self._folder.child(self._names[0]))

    @property
    def local(self) -> bool:
        return self._folder.local

    def save(self, content: bytes) -> None:
        """Write what `encode_checkpoint` made as the newest one. Raises OSError."""
        number, newest = self._last or max(self._headers(), default=(0, self._names[1]))
        number, name = number + 1, self._names[newest == self._names[0]]
        counted = number.to_bytes(_NUMBER_BYTES, "big")
        digest = zlib.crc32(content, zlib.crc32(counted)).to_bytes(_DIGEST_BYTES, "big")
        self._folder.write_bytes(name, b"".join((_MAGIC, counted, digest, content)))
        self._last = number, name

    def read(self) -> tuple[bytes | None, str | None]:
        """The content of the newest that is whole, or None if there is none; and what is damaged."""
        found = self._headers()
        most = max(found, default=(0, ""))[0]
        damaged = None
        for _, name in sorted(found, key=lambda each: (each[0] > 0, -each[0])):
            if (payload := _verified(self._content(name))) is not None:
                self._last = most, name  # what is damaged is the next to be overwritten
                return payload, damaged and f"{damaged}: the one before it is used"
            damaged = f"the checkpoint {self._folder.child(name)} is damaged"
        return None, damaged and f"{damaged}, and there is no other: training starts anew"

    def remove(self) -> None:
        """Remove both files, and unfinished ones."""
        for name in self._names:
            self._folder.remove(name)

    def _headers(self) -> list[tuple[int, str]]:
        """Number and name of the files that are there; of a damaged one the number may be 0."""
        found = []
        for name in self._names:
            with contextlib.suppress(FileNotFoundError):
                header = self._content(name, _HEADER_BYTES)
                known = header.startswith(_MAGIC) and len(header) == _HEADER_BYTES
                counted = header[len(_MAGIC) : len(_MAGIC) + _NUMBER_BYTES] if known else b""
                number = int.from_bytes(counted, "big")
                found.append((number if number < _MOST else 0, name))
        return found

    def _content(self, name: str, first: int | None = None) -> bytes:
        """Nothing of a file on this disk that can't be read; a store may be back in a while."""
        if not self.local:
            return patiently(self._folder.read_bytes, name, first)
        try:
            return self._folder.read_bytes(name, first)
        except FileNotFoundError:
            raise
        except OSError:
            return b""


def encode_checkpoint(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def decode_checkpoint(payload: bytes) -> dict[str, Any]:
    """The saved state on the CPU. Loads tensors and plain values only: a checkpoint cannot run code.

    InputError for what `encode_checkpoint` can't have written; its checksum was right, so somebody else did.
    """
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler fails in any way on bytes that it did not write
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"the checkpoint can't be read: {first}", allowed="one of this training") from error
    if not isinstance(state, dict):
        raise InputError("the checkpoint holds no state of a training", allowed="one of this training")
    return state


class CheckpointClock:
    """Decides when the next checkpoint is worth its time: it may take a twentieth of the training.

    So a trial of short epochs is not slowed down by writing them all, and what a kill can cost stays
    small: an epoch, or `least_seconds`, or twenty times what a checkpoint takes, whichever is longest.

    To a folder that is not on this disk it is sent while training goes on, one at a time. A checkpoint is
    an insurance: where it can't be saved training goes on, the one before stays valid, and `notes` says so.
    """

    share = 0.05
    least_seconds = 1.0

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._cost = 0.0
        self._last = time.monotonic()
        self._sender = None if checkpoint.local else ThreadPoolExecutor(1, "checkpoint")
        self._sending: Future[None] | None = None
        self._failed = False
        """A checkpoint could not be saved, and that was said."""
        self._notes: list[str] = []

    def __enter__(self) -> CheckpointClock:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """What is being sent arrives: nothing is written once the trial is over."""
        if self._sender is not None:
            self._sender.shutdown()

    def due(self) -> bool:
        if self._sending is not None and not self._sending.done():
            return False
        return time.monotonic() - self._last >= max(self.least_seconds, self._cost / self.share)

    def save(self, state: dict[str, Any], *, wait: bool = False) -> None:
        """Write a checkpoint, or begin to; with `wait` it has arrived when this returns."""
        start = time.monotonic()
        content = encode_checkpoint(state)
        if self._sender is None:
            self._write(content, state["epoch"], start)
            return
        self._last = time.monotonic()
        self._sending = self._sender.submit(self._write, content, state["epoch"])
        if wait:
            self._sending.result()

    def notes(self) -> tuple[str, ...]:
        """What is worth a line in the log, once."""
        notes, self._notes = self._notes, []
        return tuple(notes)

    def _write(self, content: bytes, epoch: int, start: float | None = None) -> None:
        start = time.monotonic() if start is None else start
        try:
            self._checkpoint.save(content)
        except OSError as error:
            note = f"checkpoint of epoch {epoch} could not be saved: {error.strerror or error}"
            logger.warning("%s", note)
            if not self._failed:
                self._notes.append(note)
            self._failed = True
        self._last = time.monotonic()  # what failed is not tried at every epoch
        self._cost = self._last - start


def _verified(content: bytes) -> bytes | None:
    start = len(_MAGIC)
    counted = content[start : start + _NUMBER_BYTES]
    digest = content[start + _NUMBER_BYTES : _HEADER_BYTES]
    payload = content[_HEADER_BYTES:]
    whole = zlib.crc32(payload, zlib.crc32(counted)).to_bytes(_DIGEST_BYTES, "big") == digest
    return payload if content.startswith(_MAGIC) and whole else None
