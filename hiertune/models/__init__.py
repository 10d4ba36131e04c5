"""Models: a backbone makes shared features, a head turns them into logits of every level."""

from hiertune.models.backbones import MLP, Identity
from hiertune.models.classifier import HierarchicalClassifier, build_model
from hiertune.models.head import HierarchicalHead
from hiertune.models.refine import LevelSettings, Refinement, settings_by_level

__all__ = [
    "MLP",
    "HierarchicalClassifier",
    "HierarchicalHead",
    "Identity",
    "LevelSettings",
    "Refinement",
    "build_model",
    "settings_by_level",
]
