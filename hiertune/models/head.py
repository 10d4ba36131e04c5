"""From shared features to the logits of every level, in one pass.

Shapes: B batch, D features, L levels, C_l classes of level l (levels run coarse -> fine).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hiertune.models.refine import HeadKind, LevelSettings, Refinement, settings_by_level, widen
from hiertune.taxonomy import Taxonomy


class LevelLinears(nn.Module):
    """One linear layer per level, by the level's name.

    `nn.ModuleDict` refuses names such as `type`, `train` or `a.b`, which levels may have; here the
    parameters are named by the level's position.
    """

    def __init__(self, in_features: int, sizes: Mapping[str, int], biases: Mapping[str, bool]) -> None:
        super().__init__()
        self._positions = {level: position for position, level in enumerate(sizes)}
        self.layers = nn.ModuleList(
            nn.Linear(in_features, size, bias=biases[level]) for level, size in sizes.items()
        )

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
    """Logits of every level: a linear layer per level gives base logits, which `Refinement` refines.

    `kind` says how, for all levels or, with `mixed`, by level; the other arguments are those of
    `settings_by_level`.
    """

    def __init__(
        self, in_features: int, taxonomy: Taxonomy, kind: HeadKind = "linear", **settings: Any
    ) -> None:
        """Raises InputError (a ValueError) for wrong settings."""
        super().__init__()
        self.taxonomy = taxonomy
        self.levels = taxonomy.levels
        self.kind = kind
        self.settings: dict[str, LevelSettings] = settings_by_level(taxonomy.levels, kind, **settings)
        self.progress = 1.0
        """Share of all training steps that is done, in [0, 1]: what temperatures follow."""
        sizes = dict(zip(taxonomy.levels, taxonomy.num_classes, strict=True))
        self.linear = LevelLinears(in_features, sizes, {level: s.bias for level, s in self.settings.items()})
        self.refinement = Refinement(taxonomy, self.settings)

    @property
    def refines(self) -> bool:
        """Whether refined logits differ from base logits."""
        return self.refinement.refines

    @property
    def temperatures(self) -> dict[str, float]:
        """Current temperature of each level that has one."""
        return {
            level: settings.temperature_at(self.progress)
            for level, settings in self.settings.items()
            if settings.kind == "conditional"
        }

    def forward(self, features: Tensor, refine: bool = True) -> dict[str, Tensor]:
        """Logits `[B, C_l]` per level from features `[B, D]`; base logits with `refine=False`."""
        base = self.base(features)
        return self.refine(base) if refine else base

    def base(self, features: Tensor) -> dict[str, Tensor]:
        """The linear layers' logits."""
        return {level: linear(features) for level, linear in self.linear.items()}

    def refine(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Refined logits from base logits, at the current temperature."""
        return self.refinement(base, self.progress)

    @torch.no_grad()
    def input_gradient(self, base_gradients: Mapping[str, Tensor]) -> Tensor:
        """Gradient `[B, D]` at the features, from gradients `[B, C_l]` at the base logits of some levels."""
        return torch.stack(
            [widen(gradient) @ self.linear[level].weight for level, gradient in base_gradients.items()]
        ).sum(0)

    def extra_repr(self) -> str:
        distinct = set(self.settings.values())
        if len(distinct) > 1:
            kinds = ", ".join(f"{level}: {_shown(settings)}" for level, settings in self.settings.items())
            return f"kind={self.kind}, levels={{{kinds}}}"
        return f"kind={_shown(*distinct)}"


def _shown(settings: LevelSettings) -> str:
    if settings.kind != "conditional":
        return settings.kind
    return f"{settings.kind}, routing={settings.routing}, temperature={settings.temperature}"
