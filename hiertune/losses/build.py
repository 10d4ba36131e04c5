"""From the `loss` section of a config to one loss per level."""

from __future__ import annotations

from torch import nn

from hiertune.config import CrossEntropyConfig, LevelSmoothingConfig, LossConfig, TaxonomySmoothingConfig
from hiertune.losses.cross_entropy import CrossEntropy
from hiertune.losses.taxonomy_smoothing import TaxonomySmoothing
from hiertune.taxonomy import Taxonomy


def build_losses(config: LossConfig, taxonomy: Taxonomy) -> nn.ModuleList:
    """The loss of each level, coarse -> fine."""
    if isinstance(config, CrossEntropyConfig):
        return nn.ModuleList(CrossEntropy(config.smoothing) for _ in taxonomy.levels)
    return nn.ModuleList(_smoothing(config, taxonomy, level) for level in taxonomy.levels)


def _smoothing(config: TaxonomySmoothingConfig, taxonomy: Taxonomy, level: str) -> nn.Module:
    own = config.levels.get(level, LevelSmoothingConfig())
    if not own.enabled:
        return CrossEntropy()
    return TaxonomySmoothing(
        taxonomy,
        level,
        alpha=config.alpha if own.alpha is None else own.alpha,
        beta=config.beta if own.beta is None else own.beta,
        uniform_roots=config.uniform_roots,
        fallback_to_uniform=config.fallback_to_uniform,
        clade_share=config.clade_share,
    )
