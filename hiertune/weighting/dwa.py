"""Dynamic weight average (Liu et al., End-to-end multi-task learning with attention, CVPR 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hiertune.config import DWAConfig
from hiertune.weighting.base import Weighting, ones


class DWA(Weighting):
    """In epoch t level l weighs T * softmax(r / temperature)_l with r_l = L_l(t - 1) / L_l(t - 2).

    L are the epochs' mean losses over all rows of all ranks; r is 1 in the first two epochs, and where one
    of the two losses is 0 or was never measured. A level whose loss falls slowly gains weight.
    """

    def __init__(self, config: DWAConfig, levels: Sequence[str], device: torch.device | str = "cpu") -> None:
        super().__init__(levels, ones(levels, device))
        self._temperature = config.temperature
        self._losses = torch.full((len(levels),), torch.nan, dtype=torch.float64, device=device)

    def after_epoch(self, losses: Tensor) -> None:
        """See `Weighting.after_epoch`."""
        losses = losses.double()
        measured = (losses > 0) & (self._losses > 0)
        ratios = torch.where(measured, losses / self._losses, 1.0)
        self.weights = (len(ratios) * (ratios / self._temperature).softmax(0)).float()
        self._losses = losses

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"losses": self._losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._losses = state["losses"].to(self.weights.device)
