"""Per-level losses: `loss(logits [B, C], targets) -> [B]`, nothing masked or reduced inside.

Targets are class indices `[B]`, or distributions `[B, C]` whose rows sum to one. `level_losses` is the
one place that masks unknown labels, applies class weights and divides.
"""

from hiertune.losses.build import build_losses
from hiertune.losses.class_weights import class_weights
from hiertune.losses.cross_entropy import CrossEntropy
from hiertune.losses.reduce import MixedLabels, level_losses
from hiertune.losses.target_row import TargetRow, target_row
from hiertune.losses.taxonomy_smoothing import TaxonomySmoothing

__all__ = [
    "CrossEntropy",
    "MixedLabels",
    "TargetRow",
    "TaxonomySmoothing",
    "build_losses",
    "class_weights",
    "level_losses",
    "target_row",
]
