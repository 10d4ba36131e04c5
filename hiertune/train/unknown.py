"""Unknown labels as an outcome of their own: which levels get it, and when it counts.

Shapes: N rows of the data set, B rows, L levels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hiertune.config import MaskUnknownConfig, UnknownConfig, UnknownOutcomeConfig
from hiertune.data import HierarchicalDataset
from hiertune.taxonomy import Taxonomy
from hiertune.train.probability import probability

NAME = "unknown"


def outcome_levels(config: UnknownConfig, data: HierarchicalDataset) -> tuple[int, ...]:
    """Levels that get the outcome "unknown": of those asked for, where a training row's label is unknown."""
    if isinstance(config, MaskUnknownConfig):
        return ()
    asked = data.levels if config.levels is None else config.levels
    unknown = (data.labels[data.rows("train")] < 0).any(0)
    return tuple(level for level, name in enumerate(data.levels) if name in asked and unknown[level])


def with_unknown(config: UnknownConfig, data: HierarchicalDataset) -> tuple[Taxonomy, np.ndarray]:
    """Taxonomy and labels int64 [N, L] to train on: with a class for "unknown", the last of its level.

    It has no parent and no relatives: it inherits nothing from above, any path may end in it, and
    taxonomy smoothing treats it as any orphan.
    Without such levels they are the data set's own.
    """
    levels = outcome_levels(config, data)
    if not levels:
        return data.taxonomy, data.labels
    labels = data.labels.copy()
    taxonomy = data.taxonomy
    parents, names, anchors = list(taxonomy.parents), list(taxonomy.names), list(taxonomy.anchors)
    for level in levels:
        labels[labels[:, level] < 0, level] = len(names[level])
        parents[level] = np.append(parents[level], -1)
        anchors[level] = np.append(anchors[level], -1)
        names[level] = (*names[level], _free_name(names[level]))
    return Taxonomy.from_parents(data.levels, parents, names, anchors), labels


class UnknownLabels:
    """Which of the labels that say "unknown" count in a step.

    Phase one counts none; after it each counts with a probability, drawn anew in every epoch. A level's
    loss is the mean over the labels that count, so its scale does not depend on how many do.
    """

    def __init__(self, config: UnknownOutcomeConfig, data: HierarchicalDataset) -> None:
        self.config = config
        self._unknown = np.zeros(data.labels.shape, bool)
        levels = list(outcome_levels(config, data))
        self._unknown[:, levels] = data.labels[:, levels] < 0

    def epoch(self, random: np.random.Generator) -> Callable[[np.ndarray, float], np.ndarray | None]:
        """Labels to hide, bool [B, L], of rows [B] when a share of the training is done; None hides none."""
        draws = np.zeros(self._unknown.shape, np.float32)
        draws[self._unknown] = random.random(np.count_nonzero(self._unknown), np.float32)

        def hidden(rows: np.ndarray, progress: float) -> np.ndarray | None:
            counted = probability(self.config.probability, progress)
            if progress < self.config.masked:
                counted = 0.0
            return None if counted == 1.0 else self._unknown[rows] & (draws[rows] >= counted)

        return hidden


def _free_name(names: tuple[str, ...]) -> str:
    name = NAME
    while name in names:
        name += "_"
    return name
