"""How far off is a wrong answer? Shapes: N rows, C classes of one level, which is number `l` from 0."""

from __future__ import annotations

import torch
from torch import Tensor


def class_distances(ancestors: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Ranks that classes `a` and `b` do not share, `[N]` integers: 0 if equal, l + 1 with nothing in common.

    An unknown class (-1) shares nothing. `ancestors` `[C, l + 1]` is `Taxonomy.ancestors` of their level.
    This is the depth form of making-better-mistakes (Bertinetto et al., CVPR 2020): deepest depth minus
    that of the lowest common ancestor; `Taxonomy.class_distances`, on the device of the arguments.
    """
    of_a, of_b = ancestors[a], ancestors[b]
    known = (a >= 0) & (b >= 0)
    shared = (of_a == of_b) & (of_a >= 0) & known[:, None]
    depths = torch.arange(1, ancestors.shape[1] + 1, device=ancestors.device)
    return ancestors.shape[1] - (shared * depths).amax(1)
