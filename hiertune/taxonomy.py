"""The tree of classes, as frozen index arrays; numpy only.

Levels run coarse -> fine. Level `l` has `C_l` classes, numbered from 0; `-1` means unknown. A class is
linked to at most one class of the level just above; one without that link is a *root* (at the top) or
an *orphan* (below it), and heads a tree of its own: distances to other trees are infinite.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hiertune._text import STORABLE, is_storable
from hiertune.errors import InputError

Indices = npt.NDArray[np.int64]
Distances = npt.NDArray[np.float64]
Lineage = Sequence["str | None"]

_LEVEL_NAME = re.compile(r"[\w.-](?:[\w .-]*[\w.-])?")
_FORMAT = "hiertune.taxonomy"
_VERSION = 1
_SHOWN = 10
"""Classes listed in one message."""


@dataclass(frozen=True, eq=False, repr=False)
class Taxonomy:
    """Classes of every level and the links between them. Arrays are read-only; equal by content.

    A class is identified by its whole path: two families of one name in two orders are two classes.
    Build it with `from_lineages` or `from_parents`.
    """

    levels: tuple[str, ...]
    """Name of each level, coarse -> fine."""
    parents: tuple[Indices, ...]
    """Per level `[C_l]`: index of each class's parent in the level above; -1 at the top and for orphans."""
    names: tuple[tuple[str, ...], ...]
    """Per level: each class's own name (not its path)."""
    anchors: tuple[Indices, ...]
    """Per level `[C_l]`: for an orphan whose path is known further up (`Bacteria, unknown, X`), the node
    number of the nearest known class above the gap; else -1. Part of the class's identity, no link."""

    def __post_init__(self) -> None:
        _check_levels(self.levels)
        for field in ("parents", "names", "anchors"):
            if len(getattr(self, field)) != len(self.levels):
                found = len(getattr(self, field))
                raise InputError(f"{field} are given for {found} levels, but there are {len(self.levels)}")
        for field in ("parents", "anchors"):
            arrays = zip(self.levels, getattr(self, field), strict=True)
            object.__setattr__(self, field, tuple(_index_array(a, level, field) for level, a in arrays))
        object.__setattr__(self, "names", tuple(map(tuple, self.names)))
        for level in range(len(self.levels)):
            self._check_level(level)

    # ------------------------------------------------------------------------------ construction

    @classmethod
    def from_lineages(cls, rows: Iterable[Lineage], levels: Sequence[str]) -> Taxonomy:
        """Every class that occurs in `rows`: one name per level and row, `None` or `""` where unknown.

        Classes are numbered in the order of their paths (unknown before any name), so the same
        lineages in any order give the same taxonomy. Raises InputError for rows of a wrong length or
        type, and for a level without any class.
        """
        levels = tuple(levels)
        _check_levels(levels)
        columns = _columns(rows, levels)
        num_rows = len(columns[0])
        prefix = np.zeros(num_rows, np.int64)  # rank of each row's path so far, gaps included
        nearest = np.full(num_rows, -1, np.int64)  # node number of the nearest known class so far
        above = np.full(num_rows, -1, np.int64)  # index at the level above
        offset = 0
        parents, names, anchors = [], [], []
        for level, column in zip(levels, columns, strict=True):
            vocabulary = sorted(set(column) - {None})  # type: ignore[type-var]
            codes: dict[str | None, int] = {name: i for i, name in enumerate(vocabulary, start=1)}
            codes[None] = 0
            code = np.fromiter(map(codes.__getitem__, column), np.int64, num_rows)
            paths, row_of_path, prefix = np.unique(
                prefix * len(codes) + code, return_index=True, return_inverse=True
            )
            named = code[row_of_path] > 0
            if not named.any():
                raise InputError(f"level {level!r} is empty: no lineage names a class there")
            first = row_of_path[named]  # one row of each class
            parents.append(above[first])
            anchors.append(np.where(above[first] < 0, nearest[first], -1))
            names.append(tuple(vocabulary[i - 1] for i in code[first].tolist()))
            index_of_path = np.full(len(paths), -1, np.int64)
            index_of_path[named] = np.arange(len(first))
            above = index_of_path[prefix]
            nearest = np.where(above >= 0, above + offset, nearest)
            offset += len(first)
        return cls(levels, tuple(parents), tuple(names), tuple(anchors))

    @classmethod
    def from_parents(
        cls,
        levels: Sequence[str],
        parents: Sequence[npt.ArrayLike],
        names: Sequence[Sequence[str]] | None = None,
        anchors: Sequence[npt.ArrayLike] | None = None,
    ) -> Taxonomy:
        """From one array per level: `parents[l][i]` is an index into level `l-1`.

        -1 for every class of the top level and for orphans. Names default to `<level>_<i>`;
        `anchors` are those of another taxonomy, when it is stored and read again. Raises
        InputError naming the class for an index out of range or two classes with one path, and
        naming the level for wrong types, an empty level, or bad level names.
        """
        levels = tuple(levels)
        _check_levels(levels)
        arrays = tuple(np.asarray(array) for array in parents)
        if names is None:
            names = tuple(
                tuple(f"{level}_{i}" for i in range(array.size))
                for level, array in zip(levels, arrays, strict=False)
            )
        if anchors is None:
            anchors = tuple(np.full(array.shape, -1, np.int64) for array in arrays)
        return cls(levels, arrays, tuple(map(tuple, names)), tuple(map(np.asarray, anchors)))

    # ------------------------------------------------------------------------------------ sizes

    @property
    def num_levels(self) -> int:
        return len(self.levels)

    @cached_property
    def num_classes(self) -> tuple[int, ...]:
        """Classes per level, coarse -> fine."""
        return tuple(map(len, self.parents))

    @property
    def num_leaves(self) -> int:
        """Classes of the finest level."""
        return self.num_classes[-1]

    @property
    def num_nodes(self) -> int:
        """Classes of all levels together."""
        return sum(self.num_classes)

    # ------------------------------------------------------------------------------------ names

    def level_index(self, level: str | int) -> int:
        """Position of a level given by name, or by position (negative counts from the finest)."""
        if isinstance(level, str):
            if level in self.levels:
                return self.levels.index(level)
        elif -self.num_levels <= level < self.num_levels:
            return int(level) % self.num_levels
        raise InputError(f"there is no level {level!r}", allowed=", ".join(self.levels))

    def path(self, level: str | int, index: int) -> tuple[str | None, ...]:
        """Names from the top down to the class; None where a rank above it is unknown."""
        position = self.level_index(level)
        index = int(self._class_indices(position, index))
        known = self._lineages[position][index]
        return tuple(
            None if i < 0 else names[i] for names, i in zip(self.names, known.tolist(), strict=False)
        )

    def find(self, level: str | int, text: str) -> int:
        """Index of the class that has this name or this path, `Bacteria;Firmicutes;Bacilli`.

        A path starts at the top, and has nothing or `?` where a rank is unknown. InputError for a name
        that several classes have (it lists their paths), and for one that none has (it names the nearest).
        """
        position = self.level_index(level)
        names = self.names[position]
        path = tuple(None if name in ("", "?") else name for name in map(str.strip, text.split(";")))
        namesakes = [index for index, name in enumerate(names) if name in (text, path[-1])]
        found = [index for index in namesakes if names[index] == text or self.path(position, index) == path]
        if len(found) == 1:
            return found[0]
        where = f"of level {self.levels[position]!r}"
        if namesakes:
            problem = f"no class {where} has the path {_show(path)}"
            if found:
                problem = f"{len(found)} classes {where} are named {text!r}: give the path of one"
            paths = [_show(self.path(position, index)) for index in namesakes]
            raise InputError(problem, allowed=", ".join(paths[:_SHOWN]) + (", ..." if paths[_SHOWN:] else ""))
        close = difflib.get_close_matches(path[-1] or text, set(names), n=3)
        hint = f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
        raise InputError(f"no class {where} is named {text!r}{hint}")

    def encode(self, rows: Iterable[Lineage]) -> Indices:
        """Labels `[N, L]` of lineages (-1 unknown). InputError names the first row with an unknown path."""
        columns = _columns(rows, self.levels)
        labels = np.empty((len(columns[0]), self.num_levels), np.int64)
        nearest = np.full(len(columns[0]), -1, np.int64)
        for position, column in enumerate(columns):
            known = np.fromiter((name is not None for name in column), bool, len(column))
            index_of = self._lookup[position].get
            found = [index_of(key, -1) for key in zip(nearest.tolist(), column, strict=True)]
            label = np.array(found, np.int64)
            if (known & (label < 0)).any():
                row = int(np.argmax(known & (label < 0)))
                path = _show(tuple(c[row] for c in columns[: position + 1]))
                raise InputError(f"row {row}: {path} is not in the taxonomy", key=self.levels[position])
            labels[:, position] = label
            nearest = np.where(known, label + self._offsets[position], nearest)
        return labels

    # -------------------------------------------------------------------------------- structure

    def ancestors(self, level: str | int) -> Indices:
        """Linked ancestors `[C_l, l+1]`, read-only: column `k` is the index at level `k`, -1 unknown.

        The last column is the class itself. Everything above an orphan is unknown.
        """
        return self._ancestors[self.level_index(level)]

    def lca_levels(self, level: str | int, a: npt.ArrayLike, b: npt.ArrayLike) -> Indices:
        """Level of the lowest common ancestor of classes `a` and `b` of one level; -1 if there is none.

        `a` and `b` are class indices of any shapes that broadcast. Where they are equal, it is the level
        itself.
        """
        position = self.level_index(level)
        a, b = self._class_indices(position, a), self._class_indices(position, b)
        lca = np.full(np.broadcast_shapes(a.shape, b.shape), -1, np.int64)
        for k, column in enumerate(self._ancestors[position].T):
            of_a, of_b = column[a], column[b]
            lca[(of_a == of_b) & (of_a >= 0)] = k
        return lca

    def distances(self, level: str | int, a: npt.ArrayLike, b: npt.ArrayLike) -> Distances:
        """Edges between classes of one level through their lowest common ancestor; inf across trees."""
        lca = self.lca_levels(level, a, b)
        return np.where(lca < 0, np.inf, 2.0 * (self.level_index(level) - lca))

    def distance_matrix(self, level: str | int) -> Distances:
        """All `distances` of a level, `[C_l, C_l]`: for small levels, to look at."""
        classes = np.arange(self.num_classes[self.level_index(level)])
        return self.distances(level, classes[:, None], classes)

    def class_distances(
        self,
        level: str | int,
        a: npt.ArrayLike,
        b: npt.ArrayLike,
        form: Literal["depth", "height"] = "depth",
    ) -> Distances:
        """How wrong it is to answer `b` for `a`, in ranks, under one root put above all trees.

        `depth`: deepest depth minus the depth of the lowest common ancestor, that is the number of ranks
        that are not shared (making-better-mistakes). `height`: edges from the lowest common ancestor down
        to its deepest class of this level. They agree inside a tree; where nothing is shared, `depth` is
        the number of ranks, and `height` is one more than the longest linked chain.
        """
        if form not in ("depth", "height"):
            raise InputError(f"there is no class distance {form!r}", allowed="depth, height")
        position = self.level_index(level)
        lca = self.lca_levels(position, a, b)
        if form == "depth":
            return (position - lca).astype(np.float64)
        root_height = (self._ancestors[position] >= 0).sum(axis=1).max()
        return np.where(lca < 0, root_height, position - lca).astype(np.float64)

    def check_labels(self, labels: npt.ArrayLike) -> None:
        """InputError naming the first row of `labels` `[N, L]` that is out of range or contradicts the tree.

        Where a row is known at two levels, the finer class must lie under the coarser one; an orphan
        may have no label just above it. Unknown labels (-1) contradict nothing.
        """
        labels = np.asarray(labels)
        if labels.ndim != 2 or labels.shape[1] != self.num_levels or labels.dtype.kind not in "iu":
            raise InputError(
                f"labels are {labels.dtype} of shape {labels.shape}",
                allowed=f"integers of shape [rows, {self.num_levels}]",
            )
        for position, size in enumerate(self.num_classes):
            label = labels[:, position]
            bad = (label < -1) | (label >= size)
            if bad.any():
                row = int(np.argmax(bad))
                raise InputError(
                    f"row {row} has label {label[row]}",
                    key=self.levels[position],
                    allowed=f"-1 (unknown) to {size - 1}",
                )
        found = [
            self._contradiction(labels, coarse, fine)
            for fine in range(self.num_levels)
            for coarse in range(fine)
        ]
        if any(found):
            row, coarse, fine = min(filter(None, found))
            raise InputError(
                f"row {row} is labelled {_show(self.path(coarse, labels[row, coarse]))} at level "
                f"{self.levels[coarse]!r}, but its class at level {self.levels[fine]!r} is "
                f"{_show(self.path(fine, labels[row, fine]))}"
            )

    # -------------------------------------------------------------------------------- save, load

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain lists and strings."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "levels": list(self.levels),
            "parents": [array.tolist() for array in self.parents],
            "names": [list(names) for names in self.names],
            "anchors": [array.tolist() for array in self.anchors],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Taxonomy:
        """The inverse of `to_dict`; InputError for anything else."""
        if not isinstance(content, Mapping) or content.get("format") != _FORMAT:
            raise InputError(f"not a taxonomy: 'format' must be {_FORMAT!r}")
        if content.get("version") != _VERSION:
            raise InputError(
                f"taxonomy version {content.get('version')!r} is not known", allowed=str(_VERSION)
            )
        fields = [content.get(key) for key in ("levels", "parents", "names", "anchors")]
        if not all(isinstance(field, list) for field in fields):
            raise InputError("not a taxonomy: 'levels', 'parents', 'names' and 'anchors' must be lists")
        levels, parents, names, anchors = fields
        if not all(isinstance(per_level, list) for per_level in (*parents, *names, *anchors)):  # type: ignore[misc]
            raise InputError("not a taxonomy: 'parents', 'names' and 'anchors' must hold one list per level")
        return cls.from_parents(levels, parents, names, anchors)  # type: ignore[arg-type]

    def save(self, path: str | Path) -> None:
        """Write `to_dict` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Taxonomy:
        """Read what `save` wrote; InputError names the file and what is wrong with it."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except InputError as error:
            raise InputError(error.problem, file=path, key=error.key, allowed=error.allowed) from None
        except (OSError, ValueError) as error:
            raise InputError(f"cannot be read as a taxonomy: {error}", file=path) from None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Taxonomy):
            return NotImplemented
        return (
            self.levels == other.levels
            and self.num_classes == other.num_classes
            and self.names == other.names
            and all(map(np.array_equal, self.parents, other.parents))
            and all(map(np.array_equal, self.anchors, other.anchors))
        )

    def __hash__(self) -> int:
        return hash((self.levels, self.num_classes))

    def __repr__(self) -> str:
        sizes = ", ".join(
            f"{level}: {size}" for level, size in zip(self.levels, self.num_classes, strict=True)
        )
        return f"Taxonomy({sizes})"

    def __reduce__(self):  # unpickled arrays are writeable until the constructor freezes them
        return Taxonomy, (self.levels, self.parents, self.names, self.anchors)

    # ------------------------------------------------------------------------------------ inside

    @cached_property
    def _offsets(self) -> tuple[int, ...]:
        """Node number of each level's first class: nodes are numbered level by level."""
        return tuple(int(n) for n in np.concatenate([[0], np.cumsum(self.num_classes)]))

    @cached_property
    def _lookup(self) -> tuple[dict[tuple[int, str | None], int], ...]:
        """Per level: (node number of the nearest known class above, own name) -> class index."""
        keys = (
            zip(self._nearest(level).tolist(), names, strict=True) for level, names in enumerate(self.names)
        )
        return tuple({key: index for index, key in enumerate(of_level)} for of_level in keys)

    @cached_property
    def _ancestors(self) -> tuple[Indices, ...]:
        return self._expand(through_gaps=False)

    @cached_property
    def _lineages(self) -> tuple[Indices, ...]:
        """As `_ancestors`, with what is known above an orphan's gap."""
        return self._expand(through_gaps=True)

    def _expand(self, through_gaps: bool) -> tuple[Indices, ...]:
        tables: list[Indices] = []
        for position, parent in enumerate(self.parents):
            table = np.full((len(parent), position + 1), -1, np.int64)
            table[:, position] = np.arange(len(parent))
            linked = parent >= 0
            if position:
                table[linked, :position] = tables[-1][parent[linked]]
            if through_gaps:
                for above in range(position):
                    index = self.anchors[position] - self._offsets[above]
                    here = (self.anchors[position] >= 0) & (index >= 0) & (index < self.num_classes[above])
                    table[here, : above + 1] = tables[above][index[here]]
            table.flags.writeable = False
            tables.append(table)
        return tuple(tables)

    def _nearest(self, position: int) -> Indices:
        """Node number of the nearest known class above each class of a level; -1 if there is none."""
        parent = self.parents[position]
        return np.where(parent >= 0, parent + self._offsets[position - 1], self.anchors[position])

    def _class_indices(self, position: int, indices: npt.ArrayLike) -> Indices:
        array = np.asarray(indices)
        size = self.num_classes[position]
        if array.dtype.kind not in "iu" or ((array < 0) | (array >= size)).any():
            raise InputError(
                f"{indices!r} are not classes of level {self.levels[position]!r}",
                allowed=f"integers from 0 to {size - 1}",
            )
        return array.astype(np.int64, copy=False)

    def _contradiction(self, labels: np.ndarray, coarse: int, fine: int) -> tuple[int, int, int] | None:
        """(row, coarse, fine) of the first row whose labels at the two levels contradict each other."""
        rows = np.flatnonzero((labels[:, coarse] >= 0) & (labels[:, fine] >= 0))
        expected = self._lineages[fine][labels[rows, fine], coarse]
        # above a gap that nothing is known of, any label may stand; just above an orphan, none
        wrong = (expected != labels[rows, coarse]) & ((expected >= 0) | (coarse == fine - 1))
        return (int(rows[np.argmax(wrong)]), coarse, fine) if wrong.any() else None

    def _check_level(self, position: int) -> None:
        level, names = self.levels[position], self.names[position]
        size = self.num_classes[position]
        if len(names) != size:
            raise InputError(f"level {level!r} has {size} classes but {len(names)} names")
        for index, name in enumerate(names):
            if not (isinstance(name, str) and name and is_storable(name)):
                raise InputError(
                    f"class {index} of level {level!r} is named {name!r}", allowed=f"{STORABLE}, not empty"
                )
        self._check_parents(position)
        self._check_anchors(position)
        self._check_distinct(position)

    def _check_parents(self, position: int) -> None:
        size_above = self.num_classes[position - 1] if position else 0
        parent = self.parents[position]
        bad = (parent < -1) | (parent >= size_above)
        if bad.any():
            index = int(np.argmax(bad))
            allowed = "-1: there is no level above it"
            if position:
                allowed = f"-1 to {size_above - 1}, the classes of level {self.levels[position - 1]!r}"
            raise InputError(f"{self._name(position, index)} has parent {parent[index]}", allowed=allowed)

    def _check_anchors(self, position: int) -> None:
        anchor, parent = self.anchors[position], self.parents[position]
        if len(anchor) != len(parent):
            raise InputError(
                f"level {self.levels[position]!r} has {len(parent)} classes but {len(anchor)} anchors"
            )
        end = self._offsets[max(position - 1, 0)]
        bad = (anchor < -1) | (anchor >= end)
        if bad.any():
            index = int(np.argmax(bad))
            raise InputError(
                f"{self._name(position, index)} has anchor {anchor[index]}",
                allowed=f"-1, or a node at least two levels above it (below {end})",
            )
        both = (anchor >= 0) & (parent >= 0)
        if both.any():
            index = int(np.argmax(both))
            raise InputError(
                f"{self._name(position, index)} has contradicting parents: class {parent[index]} "
                f"just above it, and node {anchor[index]} across a gap"
            )

    def _check_distinct(self, position: int) -> None:
        keys = list(zip(self._nearest(position).tolist(), self.names[position], strict=True))
        if len(set(keys)) == len(keys):
            return
        first: dict[tuple[int, str], int] = {}
        for index, key in enumerate(keys):
            if first.setdefault(key, index) != index:
                raise InputError(
                    f"{self._name(position, index)} has the same path as class {first[key]}: "
                    "classes under one parent need different names"
                )

    def _name(self, position: int, index: int) -> str:
        return f"class {self.names[position][index]!r} ({index}) of level {self.levels[position]!r}"


def _check_levels(levels: Sequence[str]) -> None:
    if not levels:
        raise InputError("a taxonomy needs at least one level")
    for level in levels:
        if not isinstance(level, str) or not _LEVEL_NAME.fullmatch(level):
            raise InputError(
                f"{level!r} cannot be the name of a level",
                allowed="letters, digits, '_', '-', '.' and spaces between them",
            )
    if len(set(levels)) < len(levels):
        twice = next(level for i, level in enumerate(levels) if level in levels[:i])
        raise InputError(f"level {twice!r} is named twice")


def _index_array(array: npt.ArrayLike, level: str, field: str) -> Indices:
    array = np.asarray(array)
    if array.size == 0:
        raise InputError(f"level {level!r} is empty: it has no class")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(
            f"{field} of level {level!r} are {array.dtype} of shape {array.shape}",
            allowed="one list of integers per level",
        )
    frozen = array.astype(np.int64)  # a copy: nobody else can write to it
    frozen.flags.writeable = False
    return frozen


def _columns(rows: Iterable[Lineage], levels: Sequence[str]) -> list[tuple[str | None, ...]]:
    """Lineages by level, `""` as None. InputError names the first row that is not a lineage."""
    rows = list(rows)
    for row_number, row in enumerate(rows):
        if isinstance(row, str) or len(row) != len(levels):
            raise InputError(
                f"lineage {row_number} is {row!r}", allowed=f"one name per level: {', '.join(levels)}"
            )
    columns: list[tuple[str | None, ...]] = []
    for level, column in zip(levels, zip(*rows, strict=True) if rows else [()] * len(levels), strict=True):
        for kind in set(map(type, column)):
            if kind is not type(None) and not issubclass(kind, str):
                row_number = next(i for i, name in enumerate(column) if type(name) is kind)
                raise InputError(
                    f"lineage {row_number} has {column[row_number]!r} at level {level!r}",
                    allowed="a text, or nothing where the class is unknown",
                )
        columns.append(tuple(name or None for name in column) if "" in set(column) else column)
    return columns


def _show(path: Iterable[str | None]) -> str:
    return "'" + "; ".join("?" if name is None else name for name in path) + "'"
