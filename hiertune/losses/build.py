"""From the `loss` section of a config to one loss per level."""

from __future__ import annotations

from torch import nn

from hiertune.config import CrossEntropyConfig, LossConfig
from hiertune.losses.cross_entropy import CrossEntropy
from hiertune.losses.taxonomy_smoothing import TaxonomySmoothing
from hiertune.taxonomy import Taxonomy


def build_losses(config: LossConfig, taxonomy: Taxonomy) -> nn.ModuleList:
    """The loss of each level, coarse -> fine."""
    if isinstance(config, CrossEntropyConfig):
        return nn.ModuleList(CrossEntropy(config.smoothing) for _ in taxonomy.levels)
    return nn.ModuleList(
        TaxonomySmoothing(
            taxonomy, level, config.alpha, config.beta, config.uniform_roots, config.fallback_to_uniform
        )
        for level in taxonomy.levels
    )
