"""Features of a frozen backbone, computed once per data set and kept for all trials."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import safetensors
import safetensors.torch
import torch
from filelock import FileLock
from torch import Tensor

from hiertune.config import AugmentConfig, TimmConfig, TrialConfig
from hiertune.data import HierarchicalDataset, MemoryInputs
from hiertune.data.builtin import cache_folder
from hiertune.errors import InputError
from hiertune.models.timm_backbone import TimmBackbone
from hiertune.train.feed import Feed

_VERSION = 1
"""Of the files, and of how the same backbone makes features of the same images."""

_BLOCK_ROWS = 256
"""Rows of one forward pass: always the same, because its size can decide the last bits."""

_KEPT = 2
"""Backbones whose features a process keeps, of each data set."""

_known: WeakKeyDictionary[HierarchicalDataset, dict[str, MemoryInputs]] = WeakKeyDictionary()


def uses_fixed_features(config: TrialConfig) -> bool:
    """Whether a row's pooled features are the same in every epoch: a frozen backbone that sees the images
    as they are. (Mixup then mixes features; cutmix needs the images.)"""
    backbone = config.model.backbone
    return (
        isinstance(backbone, TimmConfig)
        and backbone.frozen
        and backbone.augment == AugmentConfig()
        and config.mix.kind in ("none", "mixup")
    )


def fixed_features(
    data: HierarchicalDataset,
    backbone: TimmBackbone,
    precision: str,
    device: torch.device,
    autocast: AbstractContextManager,
) -> MemoryInputs:
    """What the frozen `backbone` makes of all rows of `data`: its pooled features, float32 [N, P].

    They are kept in the cache folder and, for as long as the data set is, by this process. Of processes
    that want them at once one computes them, on all rows; the others wait for its file, without any
    collective. A damaged file is computed again. InputError if the cache folder cannot be written.
    """
    key = _key(data, backbone, precision, device)
    of_data = _known.setdefault(data, {})
    if key not in of_data:
        path = cache_folder() / "features" / f"{key}.safetensors"
        with _locked(path):
            features = _read(path)
            if features is None:
                with autocast:
                    features = _compute(data, backbone, device)
                _write(path, features)
                features = _read(path)  # from the file: the system may drop it from memory, and read it again
                assert features is not None
        if len(of_data) == _KEPT:
            del of_data[next(iter(of_data))]
        of_data[key] = MemoryInputs(features)
    return of_data[key]


def _key(data: HierarchicalDataset, backbone: TimmBackbone, precision: str, device: torch.device) -> str:
    """Names what the features depend on."""
    digest = hashlib.sha256()
    pixels = backbone.pixels
    model = [backbone.name, pixels.size, str(pixels.memory_format), precision, device.type]
    about = [_VERSION, *model, data.fingerprint, version("torch"), version("timm")]
    digest.update(json.dumps(about).encode())
    for module in (pixels, backbone.body):
        for name, tensor in module.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def _compute(data: HierarchicalDataset, backbone: TimmBackbone, device: torch.device) -> Tensor:
    features = torch.empty(len(data), backbone.pooled_features)
    blocks = np.split(np.arange(len(data)), range(_BLOCK_ROWS, len(data), _BLOCK_ROWS))
    for rows, (images, _) in zip(blocks, Feed(data.inputs, data.labels, device).batches(blocks), strict=True):
        features[rows[0] : rows[-1] + 1] = backbone.pooled(images)
    return features


# --------------------------------------------------------------------------------------- files


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Only one process of this machine at a time. The lock of one that dies is free."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        lock.acquire()
    except OSError as error:
        allowed = "a cache folder that can be written: set HIERTUNE_CACHE to one"
        raise InputError(f"cannot be written: {error}", file=path.parent, allowed=allowed) from error
    try:
        yield
    finally:
        lock.release()


def _write(path: Path, features: Tensor) -> None:
    """Readers find the whole file or none."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        safetensors.torch.save_file({"features": features}, temporary, {"crc32": _checksum(features)})
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"cannot be written: {error}", file=path) from error
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> Tensor | None:
    """The features in `path`, mapped into memory: processes share them. None if it is missing or damaged."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            features = file.get_tensor("features")
            whole = (file.metadata() or {}).get("crc32") == _checksum(features)
    except (OSError, safetensors.SafetensorError):
        return None
    return features if whole else None


def _checksum(features: Tensor) -> str:
    return f"{zlib.crc32(features.numpy().data):08x}"
