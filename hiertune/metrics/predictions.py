"""What can be said of predicted labels alone, as sums that merge exactly over batches and ranks.

Shapes: N rows, L levels, C_l classes at level l; -1 is unknown.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy.typing as npt
import torch
from torch import Tensor

from hiertune.metrics.chain import as_tensor, chain_counts
from hiertune.metrics.hierarchical import class_distances
from hiertune.taxonomy import Taxonomy


def prediction_metrics(
    predictions: npt.ArrayLike,
    labels: npt.ArrayLike,
    taxonomy: Taxonomy,
    train_labels: npt.ArrayLike,
    prefix: str,
) -> dict[str, float]:
    """Metrics of predicted labels, by name as in `Evaluation.compute`, but no loss and no top-5.

    All integers `[N, L]`. A prediction of -1 is wrong, and at the finest level shares no rank with any label.
    """
    counter = PredictionCounter(taxonomy, seen_classes(train_labels, taxonomy))
    sums = counter.sums(as_tensor(predictions), as_tensor(labels))
    return {f"{prefix}/{name}": value for name, value in counter.shares(sums.tolist()).items()}


def seen_classes(train_labels: npt.ArrayLike, taxonomy: Taxonomy) -> list[Tensor]:
    """Per level a bool tensor `[C_l]`: classes that occur in `train_labels` `[N, L]`."""
    seen = []
    for column, size in zip(as_tensor(train_labels).unbind(1), taxonomy.num_classes, strict=True):
        counts = torch.bincount(column[column >= 0], minlength=size)
        seen.append(counts > 0)
    return seen


class PredictionCounter:
    """Turns predicted labels into sums, and sums into metrics. `seen` is as `seen_classes` gives it."""

    def __init__(
        self, taxonomy: Taxonomy, seen: Sequence[Tensor], device: torch.device | str = "cpu"
    ) -> None:
        self._levels = taxonomy.levels
        self._seen = [classes.to(device) for classes in seen]
        self._ancestors = torch.tensor(taxonomy.ancestors(-1), device=device)

    @property
    def size(self) -> int:
        """How many sums there are."""
        return 4 * len(self._levels) + 6

    def sums(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """Of integers `[N, L]`: float64 `[size]`."""
        known = labels >= 0
        right = known & (predictions == labels)
        # index 0 stands in for unknown labels, which `known` masks
        columns = zip(self._seen, labels.clamp_min(0).unbind(1), strict=True)
        seen = known & torch.stack([classes[column] for classes, column in columns], 1)
        per_level = torch.stack([known, right, seen, seen & right]).sum(1)
        mistake = known[:, -1] & ~right[:, -1]
        distances = class_distances(self._ancestors, predictions[:, -1], labels[:, -1])
        mistakes = torch.stack([mistake.sum(), (mistake * distances).sum()])
        return torch.cat([per_level.flatten(), chain_counts(predictions, labels), mistakes]).double()

    def shares(self, sums: Sequence[float]) -> dict[str, float]:
        """Metrics by name, without a prefix. A share of no rows at all is 0.0."""
        count = len(self._levels)
        known, right, seen, seen_right = (sums[i * count : (i + 1) * count] for i in range(4))
        chain_right, chain, partial_right, partial, mistakes, distance = sums[4 * count :]
        metrics = {}
        for level, name in enumerate(self._levels):
            metrics[f"accuracy/{name}"] = share(right[level], known[level])
            metrics[f"accuracy_seen/{name}"] = share(seen_right[level], seen[level])
        metrics["chain_accuracy"] = share(chain_right, chain)
        metrics["partial_chain_accuracy"] = share(partial_right, partial)
        metrics["hierarchical_distance"] = share(distance, mistakes)
        metrics["average_distance"] = share(distance, known[-1])
        return metrics


def share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
