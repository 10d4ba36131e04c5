"""Where the mass of one class's smoothed target goes: as numbers and as tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from hiertune._text import visible
from hiertune.losses.taxonomy_smoothing import TaxonomySmoothing
from hiertune.taxonomy import Taxonomy


@dataclass(frozen=True)
class Relation:
    """The classes whose lowest common ancestor with the class is at one level: all get the same mass."""

    name: str
    """`itself`, `same family` (and nothing finer), ..., `unrelated`."""
    ancestor: str | None
    """Name of the common ancestor; None for unrelated classes."""
    classes: int
    each: float
    """Mass of every one of them; 0 if there are none."""

    @property
    def together(self) -> float:
        return self.classes * self.each


@dataclass(frozen=True)
class Receiver:
    """Another class, and what it gets."""

    name: str
    relation: str
    mass: float


@dataclass(frozen=True)
class TargetRow:
    """The target distribution of one class."""

    level: str
    path: tuple[str | None, ...]
    """Names from the top down to the class; None where a rank is unknown."""
    relations: tuple[Relation, ...]
    """From the class itself to unrelated classes; their masses together are 1."""
    receivers: tuple[Receiver, ...]
    """The other classes that get most, largest first; those of equal mass in the order of the classes."""
    others: int
    """Classes that get some mass, but are not among `receivers`."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        path = "; ".join(name or "?" for name in self.path)
        yield Text(f"{self.level}: {visible(path)}", style="bold")
        yield self._relations_table()
        yield ""
        if not self.receivers:
            yield "no other class gets any mass"
            return
        yield self._receivers_table()
        if self.others:
            yield f"and {self.others:,} more"

    def _relations_table(self) -> Table:
        table = Table("relation", "in", box=None)
        for heading in ("classes", "mass each", "mass together"):
            table.add_column(heading, justify="right")
        for relation in self.relations:
            masses = (f"{mass:.4g}" for mass in (relation.each, relation.together))
            table.add_row(
                Text(relation.name),
                Text(visible(relation.ancestor or "")),
                f"{relation.classes:,}",
                *masses,
            )
        return table

    def _receivers_table(self) -> Table:
        table = Table("class", "relation", box=None)
        table.add_column("mass", justify="right")
        for receiver in self.receivers:
            table.add_row(Text(visible(receiver.name)), Text(receiver.relation), f"{receiver.mass:.4g}")
        return table


def target_row(
    loss: TaxonomySmoothing, taxonomy: Taxonomy, level: str | int, index: int, most: int = 20
) -> TargetRow:
    """The target of class `index` of `level`, by the loss of that level; at most `most` >= 1 receivers."""
    position = taxonomy.level_index(level)
    mass = loss.target_rows(torch.tensor([index]))[0].numpy()
    shared = taxonomy.lca_levels(position, index, np.arange(len(mass)))
    relations = dict(_relations(taxonomy, position, index, shared, mass))
    receivers = [
        int(other) for other in np.argsort(-mass, kind="stable") if other != index and mass[other] > 0
    ]
    names = taxonomy.names[position]
    return TargetRow(
        level=taxonomy.levels[position],
        path=taxonomy.path(position, index),
        relations=tuple(relations.values()),
        receivers=tuple(
            Receiver(names[other], relations[int(shared[other])].name, float(mass[other]))
            for other in receivers[:most]
        ),
        others=len(receivers[most:]),
    )


def _relations(
    taxonomy: Taxonomy, position: int, index: int, shared: np.ndarray, mass: np.ndarray
) -> Iterator[tuple[int, Relation]]:
    """By the level of the lowest common ancestor, from the class itself to -1."""
    ancestors = taxonomy.ancestors(position)[index].tolist()
    for level in range(position, -2, -1):
        if level >= 0 and ancestors[level] < 0:
            continue  # above an orphan nothing is known
        members = mass[shared == level]
        name = (
            "itself" if level == position else "unrelated" if level < 0 else f"same {taxonomy.levels[level]}"
        )
        ancestor = None if level < 0 else taxonomy.names[level][ancestors[level]]
        yield level, Relation(name, ancestor, len(members), float(members[0]) if len(members) else 0.0)
