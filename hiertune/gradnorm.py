"""GradNorm (Chen et al., ICML 2018), also for use by itself: `from hiertune.gradnorm import update_weights`.

The code is in `hiertune.weighting.gradnorm`.
"""

from hiertune.weighting import Equal, Fixed, GradNorm, Weighting, build_weighting
from hiertune.weighting.gradnorm import balance, initial_weights, update_weights

__all__ = [
    "Equal",
    "Fixed",
    "GradNorm",
    "Weighting",
    "balance",
    "build_weighting",
    "initial_weights",
    "update_weights",
]
