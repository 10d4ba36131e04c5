"""Weights learned as the levels' uncertainty (Kendall, Gal and Cipolla, CVPR 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hiertune.config import UncertaintyConfig
from hiertune.weighting.base import Weighting, ones, sum_over_ranks


class Uncertainty(Weighting):
    """Minimises sum_l exp(-s_l) * L_l + s_l / 2 over the model and s = log sigma**2, which starts at 0.

    The paper's classification likelihood: level l weighs exp(-s_l), near 1 / (2 * L_l) in the long run, so
    a level that is hard to fit weighs less. The weights do *not* sum to T: their sum is part of what is
    learned, and scales the learning rate of the model.

    `s` follows Adam after every step, by the gradient 1/2 - exp(-s) * L of that step's loss over all
    passes and ranks (one small all-reduce per step). A level without a known label in the step keeps its
    s, and Adam's averages for it.
    """

    def __init__(
        self, config: UncertaintyConfig, levels: Sequence[str], device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(levels, ones(levels, device))
        # one tensor per level: Adam passes over those without a gradient
        self._s = [torch.zeros((), dtype=torch.float64, device=device) for _ in levels]
        self._adam = torch.optim.Adam(self._s, lr=config.lr, fused=True)

    @torch.no_grad()
    def after_step(self, losses: Tensor, known_counts: Tensor) -> None:
        """See `Weighting.after_step`."""
        gradients = 0.5 - torch.stack(self._s).neg().exp() * sum_over_ranks(
            losses.to(torch.float64, copy=True)
        )
        for s, gradient, count in zip(self._s, gradients, known_counts.tolist(), strict=True):
            s.grad = gradient if count > 0 else None
        self._adam.step()
        self.weights = torch.stack(self._s).neg().exp().float()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"s": torch.stack(self._s), "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for s, value in zip(self._s, state["s"], strict=True):
            s.copy_(value)
        self._adam.load_state_dict(state["adam"])
