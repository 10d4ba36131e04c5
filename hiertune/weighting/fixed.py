"""Weights that nothing changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hiertune.config import FixedConfig
from hiertune.errors import InputError
from hiertune.weighting.base import Weighting, ones, sum_to_count


class Equal(Weighting):
    """Every level weighs 1."""

    def __init__(self, levels: Sequence[str], device: torch.device | str = "cpu") -> None:
        super().__init__(levels, ones(levels, device))


class Fixed(Weighting):
    """Given weights, 0 for levels left out, scaled to sum to the number of levels."""

    def __init__(
        self, config: FixedConfig, levels: Sequence[str], device: torch.device | str = "cpu"
    ) -> None:
        """Raises InputError for a weight of a level that does not exist."""
        for level in config.weights:
            if level not in levels:
                raise InputError(
                    f"there is no level {level!r}", key="weighting.weights", allowed=", ".join(levels)
                )
        weights = torch.tensor([config.weights.get(level, 0.0) for level in levels], dtype=torch.float64)
        super().__init__(levels, sum_to_count(weights).to(device, torch.float32))
