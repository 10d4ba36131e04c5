"""Reading an experiment of Linnaeus: its keys with their lines, and what becomes of each.

Linnaeus merges, from weak to strong: its own defaults, the files that `BASE`, `MODEL.BASE` and a
section's `FROM` name, and the file itself. Defaults are given where a key is asked for.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hiertune._problems import nearest
from hiertune._yaml import Node, read_yaml, show
from hiertune.errors import InputError
from hiertune.linnaeus.keys import SECTIONS_WITH_FROM, find_key, is_section, known_keys

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """A key as it is written: `LOSS.TAXONOMY_SMOOTHING.ALPHA`, its value, and where."""

    key: str
    value: Any
    line: int
    file: Path


@dataclass(frozen=True)
class Outcome:
    """What became of one key."""

    key: str
    line: int
    file: Path
    to: str | None = None
    """hiertune's key, where it was carried over."""
    reason: str | None = None
    """Why it was not, where it is known."""

    @property
    def unknown(self) -> bool:
        return self.to is None and self.reason is None


class Settings:
    """The keys of an experiment; hands out checked values, and keeps account of every key.

    The readers (`flag`, `number`, ...) return `default` for a key that is not there or is None, and
    raise InputError for a value of another type. They decide nothing: `carry` and `drop` do, once per key.
    """

    def __init__(self, file: Path, entries: Iterable[Entry], includes: Iterable[Outcome] = ()) -> None:
        self.file = file
        self.entries: Mapping[str, Entry] = {entry.key: entry for entry in entries}
        self._outcomes: dict[str, Outcome] = {}
        self._includes = list(includes)

    # --------------------------------------------------------------------------------- values

    def has(self, key: str) -> bool:
        """Whether the key is written, if only to say None."""
        return key in self.entries

    def given(self, key: str) -> bool:
        """Whether the key is written and has a value."""
        return self.has(key) and self.entries[key].value is not None

    def flag(self, key: str, default: bool) -> bool:
        return self._read(key, default, _flag, "true or false")

    def whole(self, key: str, default: int) -> int:
        return self._read(key, default, _whole, "a whole number")

    def number(self, key: str, default: float) -> float:
        return self._read(key, default, _number, "a number")

    def choice(self, key: str, default: str, allowed: Iterable[str]) -> str:
        """One of `allowed`, whatever its case."""
        names = {name.lower(): name for name in allowed}
        return self._read(key, default, lambda value: names[_text(value).lower()], ", ".join(names.values()))

    def text(self, key: str, default: str) -> str:
        return self._read(key, default, _text, "text")

    def sequence(self, key: str, default: list[T], item: Callable[[Any], T], allowed: str) -> list[T]:
        return self._read(key, default, lambda value: [item(part) for part in _list(value)], allowed)

    def per_task(
        self, key: str, default: T, tasks: tuple[str, ...], item: Callable[[Any], T], what: str
    ) -> list[T]:
        """One value per task: a list in the order of the tasks, or one value for all."""

        def read(value: Any) -> list[T]:
            parts = list(value) if isinstance(value, list | tuple) else [value] * len(tasks)
            if len(parts) != len(tasks):
                raise ValueError(value)
            return [item(part) for part in parts]

        allowed = f"{what}, or a list of {len(tasks)} (one per entry of DATA.TASK_KEYS_H5)"
        return self._read(key, [default] * len(tasks), read, allowed)

    def refuse(self, key: str, problem: str, allowed: str | None = None) -> InputError:
        """An InputError about this key, to be raised."""
        entry = self.entries[key]
        return InputError(problem, file=entry.file, line=entry.line, key=key, allowed=allowed)

    def _read(self, key: str, default: T, read: Callable[[Any], T], allowed: str) -> T:
        if not self.given(key):
            return default
        value = self.entries[key].value
        try:
            return read(value)
        except (ValueError, TypeError, KeyError):
            text = "the text " if isinstance(value, str) else ""
            raise self.refuse(key, f"got {text}{show(value)}", allowed) from None

    # -------------------------------------------------------------------------------- account

    def carry(self, key: str, to: str) -> None:
        """The key decides `to`; nothing happens where it is not written."""
        self._settle(key, to=to)

    def drop(self, key: str, reason: str) -> None:
        """The key has no part in the config, for this reason."""
        self._settle(key, reason=reason)

    def carry_rest(self, prefix: str, to: str) -> None:
        """`carry` every key at or below `prefix` that nothing was decided about."""
        for key in self._undecided(prefix):
            self.carry(key, to)

    def drop_rest(self, prefix: str, reason: str) -> None:
        """`drop` every key at or below `prefix` that nothing was decided about."""
        for key in self._undecided(prefix):
            self.drop(key, reason)

    def _undecided(self, prefix: str) -> list[str]:
        """Written keys that are for `convert` to decide about, and are not decided yet."""
        below = [key for key in self.entries if f"{key}.".startswith(f"{prefix}.")]
        found = {key: find_key(key) for key in below if key not in self._outcomes}
        return [key for key, known in found.items() if known and known_keys()[known] is None]

    def outcomes(self) -> tuple[Outcome, ...]:
        """What became of every key, in the order of the files; those left over are as `keys` says."""
        for key in self.entries:
            if key not in self._outcomes:
                found = find_key(key)
                reason = known_keys()[found] if found else None
                if found and reason is None:
                    assert self.entries[key].value is None, key
                    reason = "is None"
                self._settle(key, reason=reason)
        order = {file: place for place, file in enumerate(dict.fromkeys(o.file for o in self._all()))}
        return tuple(sorted(self._all(), key=lambda o: (o.file != self.file, order[o.file], o.line, o.key)))

    def carried_to(self, target: str) -> Entry | None:
        """The key that decided `target`, or else what encloses it."""
        while target:
            for outcome in self._outcomes.values():
                if outcome.to == target:
                    return self.entries[outcome.key]
            target = target.rpartition(".")[0]
        return None

    def _all(self) -> list[Outcome]:
        return [*self._includes, *self._outcomes.values()]

    def _settle(self, key: str, *, to: str | None = None, reason: str | None = None) -> None:
        entry = self.entries.get(key)
        if entry is None:
            return
        assert key not in self._outcomes, key
        self._outcomes[key] = Outcome(key, entry.line, entry.file, to, reason)


def suggestion(key: str) -> str:
    """` (did you mean 'X'?)` for an unknown key, or nothing."""
    known = [name for name in known_keys() if "*" not in name]
    if found := nearest(key, known):
        return found
    same_name = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    return f" (did you mean '{same_name[0]}'?)" if len(same_name) == 1 else ""


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    return {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}[
        _text(value).lower()
    ]


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(value)
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(value)
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(value)
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError(value)
    return list(value)


flag_of, number_of, text_of = _flag, _number, _text
"""How one value is read: for `Settings.sequence` and `Settings.per_task`."""

# ------------------------------------------------------------------------------------- reading


def read_settings(file: Path) -> Settings:
    """Read an experiment and the files that it includes; InputError for what cannot be read."""
    includes: list[Outcome] = []
    entries = _read_file(file, (), includes)
    return Settings(file, entries.values(), includes)


def _read_file(file: Path, chain: tuple[Path, ...], includes: list[Outcome]) -> dict[str, Entry]:
    """The entries of a file over those of the files that it includes; one Outcome per key that includes."""
    if file.resolve() in chain:
        raise InputError("includes itself", file=file)
    chain = (*chain, file.resolve())
    _, top = read_yaml(file)
    own = {entry.key: entry for entry in _flatten(top, (), file)}
    merged: dict[str, Entry] = {}
    sections = {"BASE": "", "MODEL.BASE": "MODEL", **{f"{name}.FROM": name for name in SECTIONS_WITH_FROM}}
    for key, section in sections.items():
        if key in own:
            _include(own.pop(key), section, chain, includes, merged)
    _override(merged, own)
    return merged


def _include(
    entry: Entry, section: str, chain: tuple[Path, ...], includes: list[Outcome], merged: dict[str, Entry]
) -> None:
    names = entry.value if isinstance(entry.value, list) else [entry.value]
    missing: list[str] = []
    for name in names:
        if not isinstance(name, str | None):
            problem = f"got {show(entry.value)}"
            raise InputError(
                problem, file=entry.file, line=entry.line, key=entry.key, allowed="names of files"
            )
        if not name or not name.strip():
            continue
        found = _locate(name, entry.file)
        if found is None:
            missing.append(name)
            continue
        inner = _read_file(found, chain, includes)
        if section and not any(
            key.startswith(f"{section}.") for key in inner
        ):  # the file is the section alone
            inner = {
                f"{section}.{key}": Entry(f"{section}.{key}", e.value, e.line, e.file)
                for key, e in inner.items()
            }
        elif section:
            inner = {key: e for key, e in inner.items() if key.startswith(f"{section}.")}
        _override(merged, inner)
    if missing:
        reason = f"there is no file {', '.join(missing)}: its keys are missing here"
        includes.append(Outcome(entry.key, entry.line, entry.file, reason=reason))
    elif any(name and name.strip() for name in names):
        includes.append(Outcome(entry.key, entry.line, entry.file, to="the keys of that file"))
    else:
        includes.append(Outcome(entry.key, entry.line, entry.file, reason="names no file"))


def _locate(name: str, file: Path) -> Path | None:
    """A file named in `file`: from its folder, or from one above, as Linnaeus' repository is laid out."""
    folders = file.resolve().parents
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _override(weak: dict[str, Entry], strong: Mapping[str, Entry]) -> None:
    """Put `strong` over `weak`; a section that becomes a value, or the other way round, goes."""
    for key, entry in strong.items():
        for old in [
            old for old in weak if f"{old}.".startswith(f"{key}.") or f"{key}.".startswith(f"{old}.")
        ]:
            del weak[old]
        weak[key] = entry


def _flatten(node: Node, parts: tuple[str, ...], file: Path) -> list[Entry]:
    key = ".".join(parts)
    known = find_key(key)
    value_key = known is not None and not known.endswith("**")
    filters = key.endswith(("EXCLUDE_CONFIG.FILTER", "EXCLUDE_CONFIG.EXCEPT"))
    if isinstance(node.value, dict) and node.value and not filters:
        if value_key:
            raise InputError(
                f"got {show(node.value)}", file=file, line=node.line, key=key, allowed="one value"
            )
        return [e for name, inner in node.value.items() for e in _flatten(inner, (*parts, name), file)]
    value = _plain(node)
    if isinstance(value, str) and len(value) <= 1000:
        value = _decode(value)
    if known is None and is_section(key):
        if value in (None, {}):
            return []  # a section with nothing in it
        raise InputError(
            f"got {show(value)}", file=file, line=node.line, key=key, allowed="a section of keys"
        )
    return [Entry(key, value, node.line, file)]


def _plain(node: Node) -> Any:
    if isinstance(node.value, dict):
        return {name: _plain(inner) for name, inner in node.value.items()}
    if isinstance(node.value, tuple):
        return [_plain(inner) for inner in node.value]
    return node.value


def _decode(text: str) -> Any:
    """A text that is a Python literal stands for it, as in yacs: `None`, `(0.9, 0.999)`, `5e-5`."""
    try:
        value = ast.literal_eval(text)
        return value if isinstance(value, None | bool | int | float | str | list | tuple) else text
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
