"""From the `weighting` section of a config to a weighting."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from hiertune.config import (
    DWAConfig,
    EqualConfig,
    FixedConfig,
    GradNormConfig,
    UncertaintyConfig,
    WeightingConfig,
)
from hiertune.taxonomy import Taxonomy
from hiertune.weighting.base import Weighting
from hiertune.weighting.dwa import DWA
from hiertune.weighting.fixed import Equal, Fixed
from hiertune.weighting.gradnorm import GradNorm, initial_weights, measured_parameters
from hiertune.weighting.uncertainty import Uncertainty


def build_weighting(
    config: WeightingConfig,
    taxonomy: Taxonomy,
    labels: npt.NDArray[np.int64],
    backbone: nn.Module,
    device: torch.device | str = "cpu",
) -> Weighting:
    """The weighting of `config`; its tensors live on `device`.

    `labels` `[N, L]` are those of the training rows. Raises InputError for weights of levels that do not
    exist, and where GradNorm would find no parameter of `backbone` to measure.
    """
    match config:
        case EqualConfig():
            return Equal(taxonomy.levels, device)
        case FixedConfig():
            return Fixed(config, taxonomy.levels, device)
        case UncertaintyConfig():
            return Uncertainty(config, taxonomy.levels, device)
        case DWAConfig():
            return DWA(config, taxonomy.levels, device)
        case GradNormConfig():
            if config.at != "features":
                measured_parameters(backbone, config)  # said at the start, not at the first update
            initial = initial_weights(config.initial_weights, labels, taxonomy.num_classes)
            return GradNorm(config, taxonomy.levels, device, initial)
