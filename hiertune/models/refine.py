"""From the base logits of every level to refined ones, coarse -> fine.

Shapes: B batch, L levels, C classes of a level, P classes of the level above, G groups of siblings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hiertune.errors import InputError
from hiertune.taxonomy import Taxonomy

LevelKind = Literal["linear", "hierarchical_softmax", "conditional", "path_softmax"]
HeadKind = Literal[LevelKind, "mixed"]
Routing = Literal["soft", "hard", "gumbel"]
TemperatureSchedule = Literal["linear", "cosine", "exponential"]

_EXPONENTS = 60.0
"""e**-60 = 9e-27 and its inverse are far from float32's limits, also times a (scaled) gradient."""


@dataclass(frozen=True)
class LevelSettings:
    """How one level's logits are made; the fields of `config.LevelHeadConfig`.

    Raises InputError (a ValueError) for a wrong value. What `kind` has no use for is not looked at.
    """

    kind: LevelKind = "linear"
    routing: Routing = "soft"
    temperature: float = 1.0
    final_temperature: float | None = None
    temperature_schedule: TemperatureSchedule = "exponential"
    bias: bool = True
    """Of the linear layer."""
    floor: float = 1e-10

    def __post_init__(self) -> None:
        _check_choice("kind", self.kind, get_args(LevelKind))
        _check_choice("routing", self.routing, get_args(Routing))
        _check_choice("temperature_schedule", self.temperature_schedule, get_args(TemperatureSchedule))
        for key in ("temperature", "final_temperature"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{value!r}", key=key, allowed="a number above 0")
        if not 0 < self.floor < 1:
            raise InputError(f"{self.floor!r}", key="floor", allowed="a number between 0 and 1")

    def temperature_at(self, progress: float) -> float:
        """Temperature after the share `progress` in [0, 1] of all steps, exact at both ends.

        `linear` and `cosine` (half a period) go from one to the other in equal shares of their
        difference, `exponential` in equal ratios.
        """
        start, end = self.temperature, self.final_temperature
        if end is None:
            return start
        if self.temperature_schedule == "exponential":
            return start ** (1.0 - progress) * end**progress
        if self.temperature_schedule == "cosine":
            progress = (1.0 - math.cos(math.pi * progress)) / 2.0
        return (1.0 - progress) * start + progress * end


def settings_by_level(
    names: Sequence[str], kind: HeadKind = "linear", **settings: Any
) -> dict[str, LevelSettings]:
    """The settings of every level of `names`, from a head's: the keys of `config.HeadConfig`.

    `mixed` takes `levels`, the settings of single levels by name, and `default`, those of all others,
    as mappings; every other kind takes the fields of `LevelSettings` for all levels alike.
    Raises InputError.
    """
    _check_choice("kind", kind, get_args(HeadKind))
    if kind == "mixed":
        return _mixed_settings(names, **settings)
    return dict.fromkeys(names, LevelSettings(kind, **settings))


def _mixed_settings(
    names: Sequence[str],
    levels: Mapping[str, Mapping[str, Any]],
    default: Mapping[str, Any] | None = None,
) -> dict[str, LevelSettings]:
    for level in levels:
        if level not in names:
            raise InputError(f"there is no level {level!r}", key=f"levels.{level}", allowed=", ".join(names))
    default = {"kind": "hierarchical_softmax"} if default is None else default
    return {name: LevelSettings(**levels.get(name, default)) for name in names}


def widen(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


class Refinement(nn.Module):
    """Refined logits of every level, made of its own base logits and the refined ones of the level above.

    `settings` has the settings of every level, whose kinds mean:

      - `linear`: refined = base.
      - `hierarchical_softmax`, `conditional`: below the top, the logarithm of the parent's probability is
        added,

            refined = base + log(r(parent's refined logits) @ H + floor)

        where `H` is the 0/1 matrix of links. As each class has one parent, the product only copies the
        parent's column, so `H` is never built. Classes without a parent (the top level, orphans) get no
        prior. `floor` keeps every class reachable: with its default no parent can cost a class more than
        log(1e-10) = -23.03. Softmax over such a level is *not* normalised among siblings.
        `hierarchical_softmax` takes r = softmax, `conditional` takes r by `routing`:
          - `soft`: softmax(logits / temperature);
          - `hard`: the argmax alone in evaluation, as `soft` in training;
          - `gumbel`: a Gumbel-softmax sample at `temperature` in training, as `soft` in evaluation.
        Source: the hierarchical heads of Linnaeus (polli-labs), as documented.
      - `path_softmax`: refined logits are log-probabilities, normalised among siblings,

            log P(c) = log P(parent of c) + log softmax of the base logits over c and its siblings

        and over the whole top level, so P(c) is the product along the path to c (Morin & Bengio, AISTATS
        2005). Orphans have no siblings: P(orphan) is the softmax of the base logits over *all* classes of
        the level, and the P of all others is multiplied by what the orphans leave. Where every class of the
        level above has a child, the probabilities of a level sum to one. A class without children keeps
        its probability to itself: those below sum to less than one, and a softmax over the level gives
        the probabilities given that there is a class at this level. Where the level above is of another
        kind, P(parent) is the softmax of its refined logits.

    Refined logits are float32 or wider, whatever autocast gave, unless every level is `linear`.
    """

    def __init__(self, taxonomy: Taxonomy, settings: Mapping[str, LevelSettings]) -> None:
        super().__init__()
        self.settings = {level: settings[level] for level in taxonomy.levels}
        above: LevelSettings | None = None
        self.rules = nn.ModuleList()
        for position, of_level in enumerate(self.settings.values()):
            self.rules.append(_rule(taxonomy, position, of_level, above))
            above = of_level

    @property
    def refines(self) -> bool:
        """Whether refined logits differ from base logits."""
        return any(settings.kind != "linear" for settings in self.settings.values())

    def forward(self, base: Mapping[str, Tensor], progress: float = 1.0) -> dict[str, Tensor]:
        """Refined logits `[B, C]` per level from base logits.

        `progress` is the share of all training steps that is done, which the temperature follows.
        """
        if not self.refines:
            return dict(base)
        refined: dict[str, Tensor] = {}
        above: Tensor | None = None
        for (level, settings), rule in zip(self.settings.items(), self.rules, strict=True):
            above = refined[level] = rule(widen(base[level]), above, settings.temperature_at(progress))
        return refined


def _rule(
    taxonomy: Taxonomy, position: int, settings: LevelSettings, above: LevelSettings | None
) -> nn.Module:
    """What refines one level: called with its base logits, the refined ones above it, and the temperature."""
    if settings.kind == "path_softmax":
        if above is None:
            return _LogSoftmax()
        return _PathSoftmax(taxonomy, position, above.kind == "path_softmax")
    if settings.kind == "linear" or above is None:
        return _Unrefined()
    return _ParentPrior(taxonomy, position, settings)


class _Unrefined(nn.Module):
    def forward(self, base: Tensor, above: Tensor | None, temperature: float) -> Tensor:
        return base


class _LogSoftmax(nn.Module):
    def forward(self, base: Tensor, above: Tensor | None, temperature: float) -> Tensor:
        return F.log_softmax(base, dim=1)


class _ParentPrior(nn.Module):
    """`hierarchical_softmax` and `conditional`, below the top."""

    columns: Tensor

    def __init__(self, taxonomy: Taxonomy, position: int, settings: LevelSettings) -> None:
        super().__init__()
        self.conditional = settings.kind == "conditional"
        self.routing = settings.routing if self.conditional else "soft"
        self.floor = settings.floor
        parents, above = taxonomy.parents[position], taxonomy.num_classes[position - 1]
        self.has_orphans = bool((parents < 0).any())
        # [C]: column of the parent's log-prior; orphans point one past the end, at a column of zeros
        columns = torch.from_numpy(np.where(parents < 0, above, parents))
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, base: Tensor, above: Tensor, temperature: float) -> Tensor:
        # the floor underflows in half precision, but not in log space at float32
        log_floor = torch.tensor(math.log(self.floor), dtype=torch.float64)
        log_prior = torch.logaddexp(self._log_routing(above, temperature), log_floor)
        if self.has_orphans:
            log_prior = F.pad(log_prior, (0, 1))
        # in place: what is copied is fresh, and not saved
        return log_prior.index_select(1, self.columns).add_(base)

    def _log_routing(self, logits: Tensor, temperature: float) -> Tensor:
        if self.routing == "hard" and not self.training:
            winners = logits.argmax(1, keepdim=True)
            return torch.full_like(logits, -math.inf).scatter_(1, winners, 0.0)
        if self.routing == "gumbel" and self.training:
            logits = logits + _gumbel_noise(logits)
        if self.conditional and temperature != 1:
            logits = logits / temperature
        return F.log_softmax(logits, dim=1)


class _PathSoftmax(nn.Module):
    """`path_softmax` below the top. Siblings form a group; all orphans of the level form one, the last."""

    groups: Tensor
    columns: Tensor | None

    def __init__(self, taxonomy: Taxonomy, position: int, above_is_normalized: bool) -> None:
        super().__init__()
        self.above_is_normalized = above_is_normalized
        parents = taxonomy.parents[position]
        self.has_orphans = bool((parents < 0).any())
        with_children, groups = np.unique(parents, return_inverse=True)
        if self.has_orphans:  # -1 sorts first
            with_children, groups = with_children[1:], np.where(groups == 0, len(with_children), groups) - 1
        self.num_linked = len(with_children)
        everyone = self.num_linked == taxonomy.num_classes[position - 1]
        # [C]: group of each class; [groups with a parent]: that parent, None where they are 0, 1, 2, ...
        self.register_buffer("groups", torch.from_numpy(groups), persistent=False)
        self.register_buffer(
            "columns", None if everyone else torch.from_numpy(with_children), persistent=False
        )

    def forward(self, base: Tensor, above: Tensor, temperature: float) -> Tensor:
        if self.num_linked == 0:
            return F.log_softmax(base, dim=1)
        log_parents = above if self.above_is_normalized else F.log_softmax(above, dim=1)
        if self.columns is not None:
            log_parents = log_parents.index_select(1, self.columns)
        log_sums = self._log_sums(base)
        shifts = log_parents - log_sums[:, : self.num_linked]
        if self.has_orphans:
            of_linked = log_sums[:, :-1].logsumexp(1, keepdim=True)
            of_all = torch.logaddexp(of_linked, log_sums[:, -1:])
            shifts = torch.cat([shifts + (of_linked - of_all), -of_all], 1)
        return shifts.index_select(1, self.groups).add_(base)  # in place: what is copied is not saved

    def _log_sums(self, logits: Tensor) -> Tensor:
        """Log of the sum of exp(logits) over each group, `[B, G]`."""
        offset = self._offset(logits.detach())
        of_classes = offset if offset.shape[1] == 1 else offset.index_select(1, self.groups)
        terms = (logits - of_classes).exp_()
        sums = terms.new_zeros(len(logits), self._num_groups).index_add_(1, self.groups, terms)
        return sums.log() + offset

    def _offset(self, logits: Tensor) -> Tensor:
        """What `exp` needs taken off, for no group to vanish or overflow: `[B, G]`, or `[B, 1]` for all.

        The largest logit of a row is found ten times as fast as that of each group, and where the
        logits of every row lie close together it will do. On a GPU, to look would mean to wait.
        """
        if logits.device.type == "cpu":
            largest = logits.amax(1, keepdim=True)
            if (largest - logits.amin(1, keepdim=True) < _EXPONENTS).all():
                return largest
        lowest = logits.new_full((len(logits), self._num_groups), -math.inf)
        return lowest.scatter_reduce_(1, self.groups.expand_as(logits), logits, "amax")

    @property
    def _num_groups(self) -> int:
        return self.num_linked + self.has_orphans


def _gumbel_noise(like: Tensor) -> Tensor:
    """-log(-log(u)) of uniform u: drawn six times as fast on CPU as by way of `exponential_`."""
    tiny = torch.finfo(like.dtype).tiny  # u can be exactly 0
    return torch.rand_like(like).clamp_min_(tiny).log_().neg_().log_().neg_()


def _check_choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{value!r}", key=key, allowed=", ".join(allowed))
