"""Random changes of training images, by torchvision's transforms.

Shapes: B rows, H, W, C height, width and channels of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hiertune.config import AugmentConfig
from hiertune.train.batches import random_stream

Augment = Callable[[Tensor, np.ndarray], Tensor]
"""Images uint8 [B, H, W, C] and their rows (int64 [B]) to changed images, of one size."""

_STREAM = 1  # beside the streams that have no row


class Augmentation:
    """What a row gets depends on seed, epoch and row alone, and leaves torch's own generators untouched.

    In this order: crop and resize, mirror, policy, colours, erase.
    """

    def __init__(self, config: AugmentConfig, seed: int, image_size: int, threads: int = 1) -> None:
        """`image_size`: crops get this height and width, or the image's own where those are smaller.
        Rows are shared out among `threads`, which changes nothing else."""
        self._config, self._seed, self._image_size, self._threads = config, seed, image_size, threads

    def of_epoch(self, epoch: int) -> Augment:
        """The changes of one epoch; may be called from any thread."""

        def augment(images: Tensor, rows: np.ndarray) -> Tensor:
            transform = self._transform(*images.shape[1:3])
            changed = images.new_empty((len(images), *self.output_size(*images.shape[1:3]), images.shape[3]))

            def change(place: int, row: int) -> None:
                generator = torch.Generator().manual_seed(random_stream(self._seed, epoch, row, _STREAM))
                with _DrawFrom(generator):
                    changed[place] = transform(images[place].permute(2, 0, 1)).permute(1, 2, 0)

            if self._threads == 1:
                for place, row in enumerate(rows.tolist()):
                    change(place, row)
            else:
                with ThreadPoolExecutor(self._threads, "hiertune-augment") as pool:
                    list(pool.map(change, range(len(rows)), rows.tolist()))
            return changed

        return augment

    @property
    def _crops(self) -> bool:
        return self._config.crop_scale != (1.0, 1.0)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of changed images, from those of the data's."""
        if not self._crops:
            return height, width
        return min(height, self._image_size), min(width, self._image_size)

    def _transform(self, height: int, width: int) -> Callable[[Tensor], Tensor]:
        from torchvision.transforms import v2

        config = self._config
        policies = {
            "rand_augment": v2.RandAugment,
            "trivial_augment": v2.TrivialAugmentWide,
            "auto_augment": v2.AutoAugment,
        }
        changes: list[torch.nn.Module] = []
        if self._crops:
            size = self.output_size(height, width)
            changes.append(v2.RandomResizedCrop(size, scale=config.crop_scale, antialias=True))
        if config.flip > 0:
            changes.append(v2.RandomHorizontalFlip(config.flip))
        if config.policy != "none":
            changes.append(policies[config.policy]())
        if (strength := config.color_jitter) > 0:
            changes.append(v2.ColorJitter(brightness=strength, contrast=strength, saturation=strength))
        if config.erasing > 0:
            changes.append(v2.RandomErasing(config.erasing))
        return v2.Compose(changes)


_FILLS = (torch.Tensor.uniform_, torch.Tensor.normal_)


class _DrawFrom(TorchFunctionMode):
    """Within it, this thread draws random numbers from this generator, not from torch's global one."""

    _DRAWS = frozenset({torch.rand, torch.randint, torch.randn, torch.randperm, *_FILLS})

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._DRAWS:
            kwargs.setdefault("generator", self._generator)
        return func(*args, **kwargs)
