"""Label smoothing that leaks to relatives: the closer in the taxonomy, the more.

The target row of class y gives `1 - alpha` to y, and `alpha * exp(-beta * d(y, j)) / sum` to every other
class j, with d in edges through the lowest common ancestor (Linnaeus' taxonomy-aware smoothing). Classes of
other trees are infinitely far; `clade_share` below 1 gives them a part of alpha all the same. A row
therefore takes one value per level of the common ancestor: `O(C * depth)` numbers hold what the `[C, C]`
matrix holds. Rows are made when they are needed, by handing values down the tree.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hiertune.errors import InputError
from hiertune.taxonomy import Taxonomy

DENSE_CLASSES = 2048
"""Up to so many classes the whole table of rows is kept: copying a row is faster than making it."""

CHUNK_ELEMENTS = 2**18
"""On the CPU, logits are worked through in blocks of rows of about so many elements: larger temporaries cost
more in page faults than the arithmetic, much smaller ones more in calls."""


class TaxonomySmoothing(nn.Module):
    """Cross-entropy against taxonomy-smoothed targets, for one level.

    `alpha` in [0, 1] is the mass that leaves the true class; `beta` >= 0 how fast it falls with distance
    (0: evenly over all relatives). `clade_share` in [0, 1] of `alpha` goes to the relatives: the other
    classes of the class's clade, the tree that a top-level class or an orphan heads. The rest goes evenly
    to the classes of all other clades (partial subtree weighting). Special rows:

    - A class with no relative at this level (nothing at a finite distance) spreads `alpha` evenly
      over all others.
    - Where all classes of the level are one clade, all of `alpha` stays inside.
    - `uniform_roots`: so does a class without a parent. In a taxonomy of levels such a class never has
      a relative, so both settings give the same rows.
    - A level where no class has a parent (the top): even smoothing with `fallback_to_uniform`, none without.
    - A level of one class: its target is 1.

    Nothing here is saved in checkpoints: it follows from the taxonomy and the arguments. `InputError`
    for `alpha`, `beta` or `clade_share` out of range.
    """

    ancestors: Tensor
    """int32 `[C, l+1]`: each class's ancestor at every level; unknown ones are the spare node `C_k`."""
    weights: Tensor
    """float64 `[C, l+2]`: value for unrelated classes; for those that share the ancestor at level 0, 1,
    ... but none finer; for the class itself."""
    links: Tensor
    """int32, the levels below the top one after another: each node's parent. Orphans hang from the spare
    node, which stands for unrelated classes; every level but the finest has one, as its last node."""
    table: Tensor | None
    """float32 `[C, C]`: all rows, for levels of few classes."""

    def __init__(
        self,
        taxonomy: Taxonomy,
        level: str | int,
        alpha: float = 0.1,
        beta: float = 1.0,
        uniform_roots: bool = True,
        fallback_to_uniform: bool = True,
        clade_share: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0.0 <= alpha <= 1.0:
            raise InputError(f"alpha is {alpha}", allowed="0 <= alpha <= 1")
        if not 0.0 <= beta < math.inf:
            raise InputError(f"beta is {beta}", allowed="a finite number >= 0")
        if not 0.0 <= clade_share <= 1.0:
            raise InputError(f"clade_share is {clade_share}", allowed="0 <= clade_share <= 1")
        self.alpha, self.beta, self.clade_share = alpha, beta, clade_share
        depth = taxonomy.level_index(level)
        self.num_classes = taxonomy.num_classes[depth]
        has_parent = taxonomy.parents[depth] >= 0
        smoothed = self.num_classes > 1 and (has_parent.any() or fallback_to_uniform)
        even = ~has_parent if uniform_roots else np.zeros_like(has_parent)
        ancestors = taxonomy.ancestors(depth)
        weights = _row_values(ancestors, alpha if smoothed else 0.0, beta, even, clade_share)

        sizes = taxonomy.num_classes[: depth + 1]
        nodes = np.where(ancestors >= 0, ancestors, sizes)
        links = _links(taxonomy, depth)
        self._nodes_per_level = [size + 1 for size in sizes[:-1]] + [self.num_classes]
        self.register_buffer("ancestors", torch.from_numpy(nodes.astype(np.int32)), persistent=False)
        self.register_buffer("weights", torch.from_numpy(weights), persistent=False)
        self.register_buffer("links", torch.from_numpy(links), persistent=False)
        table = None
        if self.num_classes <= DENSE_CLASSES:
            table = self._rows_of_classes(torch.arange(self.num_classes), torch.float32)
        self.register_buffer("table", table, persistent=False)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss `[B]` of logits `[B, C]` for classes `[B]`, or for distributions `[B, C]` whose rows sum to 1.

        A distribution mixes the rows of its classes. Half-precision logits are computed with in float32.
        """
        if logits.dim() != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(f"logits are {tuple(logits.shape)}, but must be [rows, {self.num_classes}]")
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        with torch.autocast(logits.device.type, enabled=False):
            return _CrossEntropyWithRows.apply(logits, targets, self._rows)

    def target_matrix(self) -> Tensor:
        """All target rows, `[C, C]` float64, row = true class: to look at, for few classes."""
        return self.target_rows(torch.arange(self.num_classes, device=self.weights.device))

    def target_rows(self, classes: Tensor) -> Tensor:
        """The target rows `[B, C]`, float64, of classes `[B]`: to look at."""
        return self._rows_of_classes(classes, torch.float64)

    def state_bytes(self) -> int:
        """Bytes held between calls."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def extra_repr(self) -> str:
        knobs = f"alpha={self.alpha}, beta={self.beta}, clade_share={self.clade_share}"
        return f"classes={self.num_classes}, {knobs}"

    def _rows(self, targets: Tensor, dtype: torch.dtype) -> Tensor:
        if targets.is_floating_point():
            return self._rows_of_mixtures(targets.to(dtype))
        if self.table is not None and dtype == self.table.dtype:
            return self.table.index_select(0, targets)
        return self._rows_of_classes(targets, dtype)

    def _rows_of_classes(self, classes: Tensor, dtype: torch.dtype) -> Tensor:
        """Target rows `[B, C]` of classes `[B]`: at each level the class's own ancestor gets another value,
        and all nodes hand theirs down."""
        values = self.weights.index_select(0, classes).to(dtype)
        own = self.ancestors.index_select(0, classes).long()
        links = self.links.split(self._nodes_per_level[1:])
        rows = values[:, :1].repeat(1, self._nodes_per_level[0])
        for level in range(own.shape[1]):
            if level:
                rows = rows.index_select(1, links[level - 1])
            rows.scatter_(1, own[:, level, None], values[:, level + 1, None])
        return rows

    def _rows_of_mixtures(self, mixtures: Tensor) -> Tensor:
        """`mixtures @ target_matrix()`: as above, with each level's *change* of value summed per node."""
        values = self.weights.to(mixtures.dtype)
        changes = values.diff(dim=1)
        links = self.links.split(self._nodes_per_level[1:])
        rows = (mixtures @ values[:, :1]).repeat(1, self._nodes_per_level[0])
        for level in range(changes.shape[1]):
            if level:
                rows = rows.index_select(1, links[level - 1])
            rows.index_add_(1, self.ancestors[:, level], mixtures * changes[:, level])
        return rows


class _CrossEntropyWithRows(torch.autograd.Function):
    """-sum(row * log_softmax(logits)), with its gradient `softmax - row` made in the forward pass.

    The gradient is scaled out of place: GradNorm goes back through one forward more than once.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, make_rows: Callable[[Tensor, torch.dtype], Tensor]):
        needs_gradient = ctx.needs_input_grad[0]
        losses = logits.new_empty(logits.shape[0])
        gradient = torch.empty_like(logits) if needs_gradient else None
        step = _rows_per_chunk(logits)
        for start in range(0, logits.shape[0], step):
            chunk = slice(start, start + step)
            rows = make_rows(targets[chunk], logits.dtype)
            out = None if gradient is None else gradient[chunk]
            log_p = torch.log_softmax(logits[chunk], dim=1, out=out)
            losses[chunk] = -torch.linalg.vecdot(rows, log_p)
            if gradient is not None:
                log_p.exp_().sub_(rows)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_losses.unsqueeze(1), None, None


def _rows_per_chunk(logits: Tensor) -> int:
    if logits.device.type != "cpu":
        return max(1, logits.shape[0])
    return max(1, CHUNK_ELEMENTS // logits.shape[1])


def _links(taxonomy: Taxonomy, depth: int) -> npt.NDArray[np.int32]:
    """See `TaxonomySmoothing.links`."""
    links = [np.empty(0, np.int32)]
    for level in range(1, depth + 1):
        spare_above = taxonomy.num_classes[level - 1]
        parents = taxonomy.parents[level]
        links.append(np.where(parents >= 0, parents, spare_above))
        if level < depth:
            links.append(np.array([spare_above]))
    return np.concatenate(links).astype(np.int32)


def _row_values(
    ancestors: npt.NDArray[np.int64],
    alpha: float,
    beta: float,
    even: npt.NDArray[np.bool_],
    clade_share: float,
) -> npt.NDArray[np.float64]:
    """The `[C, l+2]` values of the target rows (see `TaxonomySmoothing.weights`), computed in log space.

    `even` `[C]` marks the classes whose rows are even whatever their distances.
    """
    classes, depth = ancestors.shape[0], ancestors.shape[1] - 1
    level = np.arange(depth)
    under = np.stack([np.bincount(column + 1)[column + 1] for column in ancestors.T], axis=1)
    known = ancestors[:, :-1] >= 0
    # [C, l]: how many classes share just the ancestor at that level, and none finer
    relatives = (under[:, :-1] - under[:, 1:]) * known
    # down columns: numpy is slow along rows as short as these
    nearest = np.where(relatives > 0, level, -1).T.copy().max(axis=0, initial=-1)
    even = even | (nearest < 0)
    # distances beyond the nearest relative's: its value is 1, so that no beta makes a sum vanish
    beyond = 2.0 * np.maximum(nearest[:, None] - level, 0)
    value = np.where(relatives > 0, np.exp(-beta * beyond), 0.0)
    total = np.where(even, 1.0, (relatives * value).sum(axis=1))

    strangers = classes - 1 - np.einsum("ij->i", relatives)
    inside = np.where(strangers > 0, alpha * clade_share, alpha)
    outside = (alpha - inside) / np.maximum(strangers, 1)

    rows = np.empty((classes, depth + 2))
    rows[:, 0] = outside
    rows[:, 1:-1] = inside[:, None] * value / total[:, None]
    # the spare node of a level above the clade stands for unrelated classes
    np.copyto(rows[:, 1:-1], outside[:, None], where=~known)
    rows[even, :-1] = alpha / max(classes - 1, 1)
    rows[:, -1] = 1.0 - alpha
    return rows
