"""Checkpoints that survive a kill at any instant.

A file is a checksum followed by what `torch.save` wrote. A new one is complete on disk before it takes
the name of the old one, which stays beside it as `<name>.previous`.
"""

from __future__ import annotations

import io
import os
import pickle
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from hiertune.errors import InputError

_MAGIC = b"hiertune-checkpoint-1\n"
_DIGEST_BYTES = 4


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint at `path`; the one before it is kept as a fallback.

    After an OSError both are as they were, and nothing half-written is left.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    try:
        with open(new, "wb") as file:
            file.write(_MAGIC)
            file.write(zlib.crc32(payload).to_bytes(_DIGEST_BYTES, "big"))
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):
            new.unlink()
        raise
    if path.exists():
        os.replace(path, _previous(path))
    os.replace(new, path)
    _sync_directory(path.parent)


def read_checkpoint(path: Path) -> tuple[bytes | None, str | None]:
    """What `torch.save` wrote: the newest that is whole, or None if there is none; and what is damaged."""
    damaged = None
    for candidate in (path, _previous(path)):
        content = _content(candidate)
        if content is not None and (payload := _verified(content)) is not None:
            return payload, damaged and f"{damaged}: the one before it is used"
        if content is not None:
            damaged = f"the checkpoint {candidate} is damaged"
    return None, damaged and f"{damaged}, and there is no other: training starts anew"


def decode_checkpoint(payload: bytes) -> dict[str, Any]:
    """The saved state on the CPU. Loads tensors and plain values only: a checkpoint cannot run code.

    InputError for what `save_checkpoint` can't have written; its checksum was right, so somebody else did.
    """
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        EOFError,
        OSError,
    ) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"the checkpoint can't be read: {first}", allowed="one of this training") from error
    if not isinstance(state, dict):
        raise InputError("the checkpoint holds no state of a training", allowed="one of this training")
    return state


def remove_checkpoint(path: Path) -> None:
    """Remove the checkpoint, its fallback and any unfinished one."""
    for file in (path, _previous(path), path.with_name(path.name + ".new")):
        file.unlink(missing_ok=True)


class CheckpointClock:
    """Decides when the next checkpoint is worth its time: it may take a twentieth of the training.

    So a trial of short epochs is not slowed down by writing them all, and what a kill can cost stays
    small: an epoch, or `least_seconds`, or twenty times what a checkpoint takes, whichever is longest.
    """

    share = 0.05
    least_seconds = 1.0

    def __init__(self) -> None:
        self._cost = 0.0
        self._last = time.monotonic()
        self.failed = False
        """A checkpoint could not be saved, and that was said."""

    def due(self) -> bool:
        return time.monotonic() - self._last >= max(self.least_seconds, self._cost / self.share)

    def save(self, path: Path, state: dict[str, Any]) -> None:
        start = time.monotonic()
        try:
            save_checkpoint(path, state)
        finally:  # what failed is not tried at every epoch
            self._last = time.monotonic()
            self._cost = self._last - start


def _content(path: Path) -> bytes | None:
    """None without a file; nothing where it can't be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError:
        return b""


def _verified(content: bytes) -> bytes | None:
    header = len(_MAGIC) + _DIGEST_BYTES
    digest, payload = content[len(_MAGIC) : header], content[header:]
    whole = content.startswith(_MAGIC) and digest == zlib.crc32(payload).to_bytes(_DIGEST_BYTES, "big")
    return payload if whole else None


def _previous(path: Path) -> Path:
    return path.with_name(path.name + ".previous")


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
