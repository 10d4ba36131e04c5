"""Metrics: accuracy per level, whole paths, how far off mistakes are."""

from hiertune.metrics.accuracy import Evaluation
from hiertune.metrics.chain import chain_accuracy, partial_chain_accuracy
from hiertune.metrics.hierarchical import class_distances
from hiertune.metrics.predictions import prediction_metrics, seen_classes

__all__ = [
    "Evaluation",
    "chain_accuracy",
    "class_distances",
    "partial_chain_accuracy",
    "prediction_metrics",
    "seen_classes",
]
