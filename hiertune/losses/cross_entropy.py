"""Cross-entropy with uniform label smoothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hiertune.errors import InputError


class CrossEntropy(nn.Module):
    """Each true class keeps `1 - smoothing`; every other class gets `smoothing / (C - 1)`.

    (`torch.nn.functional.cross_entropy` spreads its smoothing over all C classes, the true one
    included.) A level of one class has nothing to spread to: its loss is zero.
    """

    def __init__(self, smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= smoothing < 1.0:
            raise InputError(f"smoothing is {smoothing}", allowed="0 <= smoothing < 1")
        self.smoothing = smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss `[B]` of logits `[B, C]` for classes `[B]`, or distributions `[B, C]` (rows sum to 1)."""
        log_p = torch.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
        if targets.is_floating_point():
            of_targets = (log_p * targets).sum(dim=1)
        else:
            of_targets = log_p.gather(1, targets.unsqueeze(1)).squeeze(1)
        classes = logits.shape[1]
        if self.smoothing == 0.0 or classes == 1:
            return -of_targets
        # s/(C-1) on the others is s*C/(C-1) spread over all classes, the true one included
        share = self.smoothing * classes / (classes - 1)
        return -(1.0 - share) * of_targets - share * log_p.mean(dim=1)

    def extra_repr(self) -> str:
        return f"smoothing={self.smoothing}"
