"""Weights of the levels' losses: equal, fixed, or learned from gradients or losses."""

from hiertune.weighting.base import Weighting
from hiertune.weighting.build import build_weighting
from hiertune.weighting.dwa import DWA
from hiertune.weighting.fixed import Equal, Fixed
from hiertune.weighting.gradnorm import GradNorm
from hiertune.weighting.uncertainty import Uncertainty

__all__ = ["DWA", "Equal", "Fixed", "GradNorm", "Uncertainty", "Weighting", "build_weighting"]
