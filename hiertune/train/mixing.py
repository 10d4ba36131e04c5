"""Selective mixup and cutmix: rows are mixed with rows of the same class of one level.

Shapes: N rows of the data set, B of a pass, M of those that are mixed, L levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hiertune.config import CutmixConfig, MixupConfig, MixupOrCutmixConfig
from hiertune.losses import MixedLabels
from hiertune.taxonomy import Taxonomy
from hiertune.train.probability import probability

Box = tuple[slice, slice]
"""Rows and columns of an image's pixels."""


@dataclass(frozen=True)
class Mix:
    """How the rows of one pass are mixed."""

    positions: np.ndarray
    """int64 [M]: places of the mixed rows in their pass."""
    partners: np.ndarray
    """int64 [M]: the row that each is mixed with."""
    share: float
    """Of a row itself; its partner has the rest."""
    first_uncertain: int
    """The first level at which a row and its partner may be of different classes."""
    box: Box | None = None
    """Pixels that are the partner's; without it, pixels and features are averaged by `share`."""

    def part(self, part: slice) -> tuple[Mix, np.ndarray]:
        """The mix of consecutive rows of the pass, and which of the M it kept, bool [M]."""
        kept = (self.positions >= part.start) & (self.positions < part.stop)
        positions = self.positions[kept] - part.start
        return Mix(positions, self.partners[kept], self.share, self.first_uncertain, self.box), kept

    def inputs(self, read: Tensor) -> Tensor:
        """Mixed inputs `[B, ...]` from those of `Pass.reads` `[B + M, ...]`; averages are floats."""
        own, partners = read.tensor_split([len(read) - len(self.positions)])
        places = torch.from_numpy(self.positions).to(read.device)
        if self.box is not None:
            mixed = own[places]
            mixed[:, self.box[0], self.box[1]] = partners[:, self.box[0], self.box[1]]
            return own.index_copy(0, places, mixed)
        if not own.is_floating_point():
            own, partners = own.to(torch.get_default_dtype()), partners.to(torch.get_default_dtype())
        return own.index_copy(0, places, torch.lerp(partners, own[places], self.share))

    def labels(self, read: Tensor) -> tuple[Tensor, MixedLabels]:
        """Labels `[B, L]` and those they are mixed with, from `[B + M, L]`."""
        own, partners = read.tensor_split([len(read) - len(self.positions)])
        places = torch.from_numpy(self.positions).to(read.device)
        return own, MixedLabels(places, partners, self.share, self.first_uncertain)


class Mixing:
    """Finds every row's partner in an epoch, and decides which passes are mixed, and by how much.

    Partners come from the whole window of rows that can be read together (in memory: the whole epoch),
    so that rows of rare classes need not meet in one batch by chance, and every row stays in the epoch:
    those that cannot be mixed are trained as they are. Each mixed row is partner of exactly one other.
    """

    def __init__(
        self,
        config: MixupConfig | CutmixConfig | MixupOrCutmixConfig,
        taxonomy: Taxonomy,
        labels: np.ndarray,
        rows: np.ndarray,
        input_shape: tuple[int, ...],
    ) -> None:
        """`labels` int [N, L] (-1 unknown) of the data set; `rows` those to train on; shape of one input."""
        self.config = config
        self.input_shape = input_shape
        level = taxonomy.num_levels - 1 if config.level is None else taxonomy.level_index(config.level)
        self.first_uncertain = level + 1
        classes = labels[:, level]
        counts = np.bincount(labels[rows, level] + 1, minlength=taxonomy.num_classes[level] + 1)
        fit = (classes >= 0) & (counts[classes + 1] >= config.min_group_size)
        if config.exclude_unknown:
            fit &= (labels >= 0).all(1)
        self._groups = np.where(fit, classes, -1)

    def epoch(
        self, windows: list[np.ndarray], random: np.random.Generator
    ) -> Callable[[np.ndarray, float], Mix | None]:
        """The mix of a pass, from its places in the epoch's order and the progress of training (0 to 1).

        To be asked for every pass in turn; it draws from `random`.
        """
        order = np.concatenate(windows)
        window = np.repeat(np.arange(len(windows)), [len(rows) for rows in windows])
        partner = order[_next_of_group(window, self._groups[order], random)]

        def mix(places: np.ndarray, progress: float) -> Mix | None:
            wanted = random.random() < probability(self.config.probability, progress)
            cut, alpha = self._kind(random)
            share = random.beta(alpha, alpha)
            centre = random.random(2)
            positions = np.flatnonzero(partner[places] != order[places])
            if not wanted or not len(positions):
                return None
            box = None
            if cut:
                height, width = self.input_shape[:2]
                side = math.sqrt(1.0 - share)
                box = _span(height, side, centre[0]), _span(width, side, centre[1])
                area = (box[0].stop - box[0].start) * (box[1].stop - box[1].start)
                share = 1.0 - area / (height * width)
            return Mix(positions, partner[places[positions]], share, self.first_uncertain, box)

        return mix

    def _kind(self, random: np.random.Generator) -> tuple[bool, float]:
        """Whether to cut, and the Beta distribution's parameter."""
        if isinstance(self.config, MixupOrCutmixConfig):
            cut = random.random() < self.config.cutmix_share
            return cut, self.config.cutmix_alpha if cut else self.config.mixup_alpha
        return isinstance(self.config, CutmixConfig), self.config.alpha


def _next_of_group(window: np.ndarray, group: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """For each place [N] the next one of its window and group in a random circle; itself in group -1."""
    shuffled = random.permutation(len(group))
    by_group = shuffled[np.lexsort((group[shuffled], window[shuffled]))]
    first = np.flatnonzero(
        np.diff(group[by_group], prepend=-2) | np.diff(window[by_group], prepend=-1)
    )  # where each circle starts
    after = np.arange(1, len(group) + 1)
    after[np.append(first[1:], len(group)) - 1] = first
    following = np.empty(len(group), np.int64)
    following[by_group] = by_group[after]
    return np.where(group < 0, np.arange(len(group)), following)


def _span(size: int, share: float, centre: float) -> slice:
    """Pixels of a side: `share` of it about `centre` (0 to 1), cut off at the edges (Yun et al., 2019)."""
    middle, half = centre * size, share * size / 2
    return slice(max(0, round(middle - half)), min(size, round(middle + half)))
