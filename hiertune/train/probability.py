"""Probabilities that change in the course of a training."""

from __future__ import annotations

import math

from hiertune.config import ConstantProbability, ProbabilityConfig


def probability(config: ProbabilityConfig, progress: float) -> float:
    """Its value when the share `progress` (0 to 1) of the training is done.

    `linear` and `cosine` have `start` up to `begin`, `end` from `until` on, and go from one to the other
    along a line, or half a cosine, between. Where both are one moment, it has `end`.
    """
    if isinstance(config, ConstantProbability):
        return config.value
    if progress >= config.until:
        return config.end
    if progress <= config.begin:
        return config.start
    way = (progress - config.begin) / (config.until - config.begin)
    if config.kind == "cosine":
        way = (1.0 - math.cos(math.pi * way)) / 2.0
    return config.start + way * (config.end - config.start)
