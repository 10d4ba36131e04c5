"""From shared features to the logits of every level, in one pass.

Shapes: B batch, D features, L levels, C_l classes of level l (levels run coarse -> fine).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hiertune.errors import InputError
from hiertune.taxonomy import Taxonomy

HeadKind = Literal["linear", "hierarchical_softmax", "conditional"]
Routing = Literal["soft", "hard", "gumbel"]


class LevelLinears(nn.Module):
    """One linear layer per level, by the level's name.

    `nn.ModuleDict` refuses names such as `type`, `train` or `a.b`, which levels may have; here the
    parameters are named by the level's position.
    """

    def __init__(self, in_features: int, sizes: Mapping[str, int], bias: bool) -> None:
        super().__init__()
        self._positions = {level: position for position, level in enumerate(sizes)}
        self.layers = nn.ModuleList(nn.Linear(in_features, size, bias=bias) for size in sizes.values())

    def __getitem__(self, level: str) -> nn.Linear:
        return self.layers[self._positions[level]]  # type: ignore[return-value]

    def __iter__(self) -> Iterator[str]:
        return iter(self._positions)

    def __len__(self) -> int:
        return len(self._positions)

    def keys(self) -> list[str]:
        return list(self._positions)

    def items(self) -> list[tuple[str, nn.Linear]]:
        return [(level, self[level]) for level in self]


class HierarchicalHead(nn.Module):
    """Logits of every level; below the top, each class may inherit from its parent.

    A linear layer per level gives base logits. Coarse -> fine, all kinds but `linear` then add the
    logarithm of the parent's probability, taken from the parent level's *already refined* logits:

        refined = base + log(r(parent's refined logits) @ H + floor)

    `H` is the 0/1 matrix of links. As each class has one parent, the product only copies the
    parent's column, so `H` is never built. Classes without a parent (the top level, orphans) get no prior.

    `kind="hierarchical_softmax"` takes r = softmax. `kind="conditional"` takes r by `routing`:
      - `soft`: softmax(logits / temperature);
      - `hard`: the argmax alone in evaluation, as `soft` in training;
      - `gumbel`: a Gumbel-softmax sample at `temperature` in training, as `soft` in evaluation.
    `routing` and `temperature` mean nothing to the other kinds.

    `floor` keeps every class reachable: with its default no parent can cost a class more than
    log(1e-10) = -23.03. Softmax over a refined level is *not* normalised among siblings.
    Source: the hierarchical heads of Linnaeus (polli-labs), as documented.
    """

    def __init__(
        self,
        in_features: int,
        taxonomy: Taxonomy,
        kind: HeadKind = "linear",
        routing: Routing = "soft",
        temperature: float = 1.0,
        bias: bool = True,
        floor: float = 1e-10,
    ) -> None:
        """Raises InputError (a ValueError) for a wrong kind, routing, temperature or floor."""
        super().__init__()
        _check_choice("kind", kind, get_args(HeadKind))
        _check_choice("routing", routing, get_args(Routing))
        if not 0 < temperature < math.inf:
            raise InputError(f"{temperature!r}", key="temperature", allowed="a number above 0")
        if not 0 < floor < 1:
            raise InputError(f"{floor!r}", key="floor", allowed="a number between 0 and 1")
        self.taxonomy = taxonomy
        self.levels = taxonomy.levels
        self.kind = kind
        self.routing = routing if kind == "conditional" else "soft"
        self.temperature = temperature if kind == "conditional" else 1.0
        self.floor = floor
        sizes = dict(zip(taxonomy.levels, taxonomy.num_classes, strict=True))
        self.linear = LevelLinears(in_features, sizes, bias)
        self._has_orphans = [bool((parents < 0).any()) for parents in taxonomy.parents]
        for position in range(1, len(self.levels)):
            self.register_buffer(f"parents_{position}", _prior_columns(taxonomy, position), persistent=False)

    @property
    def refines(self) -> bool:
        """Whether refined logits differ from base logits."""
        return self.kind != "linear"

    def forward(self, features: Tensor, refine: bool = True) -> dict[str, Tensor]:
        """Logits `[B, C_l]` per level from features `[B, D]`; base logits with `refine=False`."""
        base = self.base(features)
        return self.refine(base) if refine else base

    def base(self, features: Tensor) -> dict[str, Tensor]:
        """The linear layers' logits."""
        return {level: linear(features) for level, linear in self.linear.items()}

    def refine(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Refined logits from base logits; float32 or wider, whatever autocast gave."""
        if not self.refines:
            return dict(base)
        coarsest, *finer = self.levels
        refined = {coarsest: _widen(base[coarsest])}
        for position, level in enumerate(finer, start=1):
            prior = self._log_prior(refined[self.levels[position - 1]], position)
            refined[level] = prior.add_(_widen(base[level]))  # in place: `prior` is fresh, and not saved
        return refined

    @torch.no_grad()
    def input_gradient(self, base_gradients: Mapping[str, Tensor]) -> Tensor:
        """Gradient `[B, D]` at the features, from gradients `[B, C_l]` at the base logits of some levels."""
        return torch.stack(
            [_widen(gradient) @ self.linear[level].weight for level, gradient in base_gradients.items()]
        ).sum(0)

    def extra_repr(self) -> str:
        if self.kind == "conditional":
            return f"kind={self.kind}, routing={self.routing}, temperature={self.temperature}"
        return f"kind={self.kind}"

    def _log_prior(self, parent_logits: Tensor, position: int) -> Tensor:
        """Log of each class's floored parent probability, `[B, C_l]`; 0 for orphans."""
        # the floor underflows in half precision, but not in log space at float32
        log_floor = torch.tensor(math.log(self.floor), dtype=torch.float64)
        log_prior = torch.logaddexp(self._log_routing(parent_logits), log_floor)
        if self._has_orphans[position]:
            log_prior = F.pad(log_prior, (0, 1))
        return log_prior.index_select(1, self.get_buffer(f"parents_{position}"))

    def _log_routing(self, logits: Tensor) -> Tensor:
        if self.routing == "hard" and not self.training:
            winners = logits.argmax(1, keepdim=True)
            return torch.full_like(logits, -math.inf).scatter_(1, winners, 0.0)
        if self.routing == "gumbel" and self.training:
            logits = logits + _gumbel_noise(logits)
        if self.temperature != 1:
            logits = logits / self.temperature
        return F.log_softmax(logits, dim=1)


def _prior_columns(taxonomy: Taxonomy, position: int) -> Tensor:
    """Column of the parent's log-prior for each class; orphans point one past the end, at a zero column."""
    parents = taxonomy.parents[position]
    return torch.from_numpy(np.where(parents < 0, taxonomy.num_classes[position - 1], parents))


def _gumbel_noise(like: Tensor) -> Tensor:
    """-log(-log(u)) of uniform u: drawn six times as fast on CPU as by way of `exponential_`."""
    tiny = torch.finfo(like.dtype).tiny  # u can be exactly 0
    return torch.rand_like(like).clamp_min_(tiny).log_().neg_().log_().neg_()


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _check_choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{value!r}", key=key, allowed=", ".join(allowed))
