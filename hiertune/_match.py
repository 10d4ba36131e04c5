"""The way back from a config to a space: which picks of its distributions give just this config."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from hiertune._distributions import Choice, Range
from hiertune._tree import Picks
from hiertune._yaml import Key, Node, Scalar, show, shown_key
from hiertune.errors import InputError

Complete = Callable[[Picks], Any]
"""The whole tree of a config, defaults included, for some picks (and any for the rest); InputError for those
that break a rule between values."""


class Mismatch(Exception):
    """A config that a space does not hold: the first key that stands in the way, and why."""

    def __init__(self, key: Key, reason: str) -> None:
        self.key = shown_key(key)
        self.reason = reason
        self.depth = len(key)
        super().__init__(f"{self.key}: {reason}")


def match(root: Node, config: Any, complete: Complete, ignore: Key | None = None) -> dict[Key, Any]:
    """The pick at the address of every distribution that `config` takes; raises Mismatch if there are none.

    `config` is a tree with every value written out, the space leaves defaults out. Of a choice the first
    entry counts that holds the config's value there, with the entry's own defaults. The value at `ignore`
    may be any other.
    """
    matcher = _Matcher(config, complete, ignore)
    picks = matcher.of(root, (), (), {})
    try:
        matcher.check_defaults(picks, ())
    except InputError as error:
        raise Mismatch((), error.problem) from None
    return picks


def difference(one: Any, other: Any, key: Key = (), ignore: Key | None = None) -> tuple[Key, Any, Any] | None:
    """The first key, but for `ignore`, at which two trees of plain values differ, and what stands there."""
    if key == ignore:
        return None
    if isinstance(one, dict) and isinstance(other, dict):
        for name in [*one, *(name for name in other if name not in one)]:
            if (found := difference(one.get(name), other.get(name), (*key, name), ignore)) is not None:
                return found
        return None
    return None if _same(one, other) else (key, one, other)


class _Matcher:
    def __init__(self, config: Any, complete: Complete, ignore: Key | None) -> None:
        self._config = config
        self._complete = complete
        self._ignore = ignore

    def check_defaults(self, picks: Picks, key: Key) -> None:
        """What the space leaves out below `key` is a default, and must be just what the config has."""
        whole = self._complete(picks)
        if (found := difference(_at(self._config, key), _at(whole, key), key, self._ignore)) is not None:
            raise Mismatch(found[0], f"{show(found[1])} is not {show(found[2])}")

    def of(self, node: Node, key: Key, address: Key, route: Picks) -> dict[Key, Any]:
        """Picks below `node`, given those of the choices above it (`route`)."""
        value = self._at(key)
        if isinstance(node.value, Range):
            try:
                return {address: node.value.accept(value)}
            except ValueError:
                raise Mismatch(key, f"{show(value)} is not in {node.value}") from None
        if isinstance(node.value, Choice):
            return self._of_choice(node.value, key, address, route)
        if isinstance(node.value, dict):
            self._check_mapping(node.value, value, key)
            children: Iterator[tuple[Any, Node]] = iter(node.value.items())
        elif isinstance(node.value, tuple):
            if isinstance(value, list) and len(value) != len(node.value):
                raise Mismatch(key, f"{show(value)} is not of length {len(node.value)}")
            children = enumerate(node.value)
        elif key != self._ignore and _differ(node.value, value):
            raise Mismatch(key, f"{show(value)} is not {show(node.value)}")
        else:
            return {}
        picks: dict[Key, Any] = {}
        for part, child in children:
            picks |= self.of(child, (*key, part), (*address, part), route)
        return picks

    def _check_mapping(self, written: dict[str, Node], value: Any, key: Key) -> None:
        """The scalars of a mapping first: `kind` decides what else there is."""
        if not isinstance(value, dict):
            raise Mismatch(key, f"{show(value)} is not a mapping")
        for name, child in written.items():
            known = name in value and (*key, name) != self._ignore
            if known and isinstance(child.value, Scalar) and _differ(child.value, value[name]):
                raise Mismatch((*key, name), f"{show(value[name])} is not {show(child.value)}")

    def _of_choice(self, choice: Choice, key: Key, address: Key, route: Picks) -> dict[Key, Any]:
        nearest: Mismatch | None = None
        for label, entry in zip(choice.labels, choice.entries, strict=True):
            try:
                picks = {address: label} | self.of(
                    entry, key, (*address, (label,)), {**route, address: label}
                )
                sure = isinstance(entry.value, Range) or _same(entry.value, self._at(key))
                if not sure:
                    with contextlib.suppress(InputError):  # the rest are not the config's values: ask later
                        self.check_defaults({**route, **picks}, key)
            except Mismatch as mismatch:
                of_kind = mismatch.key in (shown_key(key), shown_key((*key, "kind")))
                if not of_kind and (nearest is None or mismatch.depth > nearest.depth):
                    nearest = mismatch
                continue
            return picks
        if nearest is not None:
            raise nearest
        value = self._at(key)
        kind = value.get("kind") if isinstance(value, dict) else None
        raise Mismatch(key, f"{kind or show(value)} is not in {choice}")

    def _at(self, key: Key) -> Any:
        return _at(self._config, key)


def _at(tree: Any, key: Key) -> Any:
    for part in key:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def _same(one: Any, other: Any) -> bool:
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _differ(written: Any, value: Any) -> bool:
    """Whether two scalars surely differ: the config may have read a text as a number."""
    if isinstance(written, bool) or isinstance(value, bool):
        return isinstance(written, bool) and isinstance(value, bool) and written != value
    both = (int | float, str)
    return any(isinstance(written, kind) and isinstance(value, kind) and written != value for kind in both)
