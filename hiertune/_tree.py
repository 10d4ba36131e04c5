"""Walks over the tree of a space: every distribution in it, and every config it can become."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hiertune._distributions import Choice, Distribution, Range, find_distribution
from hiertune._problems import Origin
from hiertune._yaml import Key, Node, Scalar, key_text, show

PAIRED = 8
"""Entries of a choice that are combined with those of another when a space is checked."""

Picks = Mapping[Key, Any]
"""A number for each range, a label for each choice, by address."""
Pick = Callable[[Key, Distribution], Any]
"""From the address of a distribution and the distribution to a number of a range, a label of a choice."""


@dataclass(frozen=True)
class Parameter:
    """One distribution of a space. A name that exclusive branches share is listed once for each."""

    name: str
    """As Optuna knows it."""
    key: str
    """Path in the resolved config, `model.head.temperature`."""
    distribution: Distribution
    conditions: tuple[tuple[str, Scalar], ...]
    """Names of the choices above it, outermost first, and the label each must take."""
    line: int
    address: Key = field(repr=False)
    """Path with the label of every branch on the way: unique in its space."""
    parent: Key = field(repr=False)
    """Address of the mapping that it stands in."""
    route: Picks = field(repr=False)
    """The conditions, by address instead of name."""

    @property
    def condition(self) -> str:
        """`model.head = conditional`, or nothing if every trial has this parameter."""
        return " and ".join(f"{name} = {label}" for name, label in self.conditions)


def _children(node: Node) -> Iterator[tuple[str | int, Node]]:
    if isinstance(node.value, dict):
        yield from node.value.items()
    elif isinstance(node.value, tuple):
        yield from enumerate(node.value)


def picker(picks: Picks) -> Pick:
    """The given values, and representatives for the rest."""
    return lambda address, dist: picks[address] if address in picks else dist.representative()


def resolve_tree(root: Node, pick: Pick) -> tuple[Any, dict[Key, Origin]]:
    """A tree of plain values, and the origin of each; the one way from a space to a config."""
    origins: dict[Key, Origin] = {}

    def visit(node: Node, key: Key, address: Key) -> Any:
        value = node.value
        origins[key] = Origin(node.line, value if isinstance(value, Range) else None)
        if isinstance(value, Range):
            return pick(address, value)
        if isinstance(value, Choice):
            label = pick(address, value)
            return visit(value.entry(label), key, (*address, (label,)))
        if isinstance(value, dict):
            return {k: visit(child, (*key, k), (*address, k)) for k, child in value.items()}
        if isinstance(value, tuple):
            return [visit(child, (*key, i), (*address, i)) for i, child in enumerate(value)]
        return value

    return visit(root, (), ()), origins


def parameters_of(root: Node) -> tuple[tuple[Parameter, ...], dict[Key, str]]:
    """Every distribution in the order of the file, and the name of each address."""
    found: list[tuple[Key, Parameter]] = []

    def visit(node: Node, key: Key, address: Key, plain: Key, parent: Key, route: Picks) -> None:
        value = node.value
        if isinstance(value, Distribution):
            parameter = Parameter("", key_text(key), value, (), node.line, address, parent, route)
            found.append((plain, parameter))
        if isinstance(value, Choice):
            for label, entry in zip(value.labels, value.entries, strict=True):
                direct = (*plain, (label,)) if isinstance(entry.value, Distribution) else plain
                visit(entry, key, (*address, (label,)), direct, parent, {**route, address: label})
        inside = address if isinstance(value, dict) else parent
        for part, child in _children(node):
            visit(child, (*key, part), (*address, part), (*key, part), inside, route)

    visit(root, (), (), (), (), {})
    asked: dict[Key, set] = {}
    for plain, parameter in found:
        asked.setdefault(plain, set()).add(_as_asked(parameter.distribution))
    names = {p.address: key_text(plain if len(asked[plain]) == 1 else p.address) for plain, p in found}
    return tuple(_named(parameter, names) for _, parameter in found), names


def _as_asked(distribution: Distribution) -> Any:
    """What Optuna sees of a distribution: equal for two that may share a name."""
    return distribution if isinstance(distribution, Range) else tuple(map(repr, distribution.labels))


def _named(parameter: Parameter, names: dict[Key, str]) -> Parameter:
    conditions = tuple((names[address], label) for address, label in parameter.route.items())
    rest = (parameter.line, parameter.address, parameter.parent, parameter.route)
    return Parameter(names[parameter.address], parameter.key, parameter.distribution, conditions, *rest)


def corner_picks(parameters: tuple[Parameter, ...]) -> Iterator[dict[Key, Any]]:
    """The picks of `Space.corners`: none, one of each distribution, then two of one mapping."""
    yield {}
    for one in parameters:
        for end in one.distribution.ends():
            yield {**one.route, one.address: end}
    for one, two in itertools.combinations(parameters, 2):
        if one.parent == two.parent:
            firsts, seconds = (p.distribution.ends()[:PAIRED] for p in (one, two))
            for first, second in itertools.product(firsts, seconds):
                yield {one.address: first, two.address: second, **one.route, **two.route}


def combinations(node: Node, address: Key) -> Iterator[dict[Key, Any]]:
    """The picks of every config of a tree whose ranges are all finite; the last ones vary fastest."""
    value = node.value
    if isinstance(value, Range):
        yield from ({address: number} for number in value.values())
    elif isinstance(value, Choice):
        for label, entry in zip(value.labels, value.entries, strict=True):
            for picks in combinations(entry, (*address, (label,))):
                yield {address: label, **picks}
    else:
        parts = [combinations(child, (*address, part)) for part, child in _children(node)]
        for chosen in itertools.product(*parts):
            yield {key: pick for picks in chosen for key, pick in picks.items()}


def size_of(node: Node) -> float:
    """How many different trees a node can become."""
    if isinstance(node.value, Range):
        return node.value.count
    one_of = isinstance(node.value, Choice)
    parts = node.value.entries if one_of else [child for _, child in _children(node)]
    sizes = [size_of(part) for part in parts]
    if math.inf in sizes:  # a huge whole number times inf would overflow
        return math.inf
    return sum(sizes) if one_of else math.prod(sizes)


def without_distributions(node: Node) -> Any:
    """The plain values of a tree."""
    if isinstance(node.value, dict):
        kept = {k: v for k, v in node.value.items() if not isinstance(v.value, Distribution)}
        return {k: without_distributions(v) for k, v in kept.items()}
    if isinstance(node.value, tuple):
        return [without_distributions(v) for v in node.value if not isinstance(v.value, Distribution)]
    return node.value


def lines_of(root: Node) -> dict[str, int]:
    """The line of every key path that is written down; of the first branch that has it."""
    lines: dict[str, int] = {}

    def visit(node: Node, key: Key) -> None:
        lines.setdefault(key_text(key), node.line)
        for entry in node.value.entries if isinstance(node.value, Choice) else ():
            visit(entry, key)
        for part, child in _children(node):
            visit(child, (*key, part))

    visit(root, ())
    return lines


def first_distribution(node: Node, key: Key) -> tuple[Key, str, int] | None:
    """Key, name and line of the first distribution in a tree as it was parsed."""
    if (name := find_distribution(node)) is not None:
        return key, name, node.value[name].line
    found = (first_distribution(child, (*key, part)) for part, child in _children(node))
    return next(filter(None, found), None)


def written(root: Node) -> dict[str, tuple[str, str]]:
    """By address: the key path, and what is written there (a value, a range, the labels of a choice)."""
    found: dict[str, tuple[str, str]] = {}

    def visit(node: Node, key: Key, address: Key) -> None:
        value = node.value
        if isinstance(value, dict):
            branch = bool(address) and isinstance(address[-1], tuple)
            for name, child in value.items():
                if not (branch and name == "kind"):  # the branch's label says it
                    visit(child, (*key, name), (*address, name))
            return
        if isinstance(value, tuple):
            plain = without_distributions(node)
            found[key_text(address)] = key_text(key), show(plain)
            for index, child in enumerate(value):
                if not isinstance(child.value, Scalar):
                    visit(child, (*key, index), (*address, index))
            return
        found[key_text(address)] = (
            key_text(key),
            str(value) if isinstance(value, Distribution) else show(value),
        )
        for label, entry in (
            zip(value.labels, value.entries, strict=True) if isinstance(value, Choice) else ()
        ):
            if not isinstance(entry.value, Scalar):
                visit(entry, key, (*address, (label,)))

    visit(root, (), ())
    return found
