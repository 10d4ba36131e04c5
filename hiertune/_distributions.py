"""The distributions of a space file: a one-key mapping such as `{uniform: [0, 1]}`, in place of a value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Protocol

from hiertune._yaml import Key, Node, Scalar, show

FORMS = {
    "uniform": "{uniform: [low, high]}",
    "loguniform": "{loguniform: [low, high]}",
    "quniform": "{quniform: [low, high, step]}",
    "int": "{int: [low, high]}",
    "logint": "{logint: [low, high]}",
    "choice": "{choice: [first, second, ...]}",
}
"""Every distribution and how it is written."""
_UNSUPPORTED = {"normal": "Optuna cannot sample it; use uniform or loguniform"}
_MOST_STEPS = 1_000_000
_MOST_ENTRIES = 1_000


class Trial(Protocol):
    """What is used of an Optuna trial."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int: ...
    def suggest_categorical(self, name: str, choices: Any) -> Any: ...


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; `quniform` is low, low + step, ... up to high."""

    name: str
    low: float
    high: float
    step: float | None = None

    def __str__(self) -> str:
        ends = [self.low, self.high] + ([] if self.step is None else [self.step])
        return f"{self.name}: [{', '.join(map(repr, ends))}]"

    @property
    def whole(self) -> bool:
        return self.name in ("int", "logint")

    @property
    def log(self) -> bool:
        return self.name.startswith("log")

    @property
    def top(self) -> float:
        """The largest value there is: `high`, or the last step below it."""
        return self.high if self.step is None else self._at(self._steps())

    @property
    def count(self) -> float:
        """How many values there are; inf for a continuous range."""
        if self.whole:
            return self.high - self.low + 1
        return math.inf if self.step is None else self._steps() + 1

    def values(self) -> Iterable[float]:
        """Every value, in order; only where `count` is finite."""
        if self.whole:
            return range(int(self.low), int(self.high) + 1)
        return map(self._at, range(self._steps() + 1))

    def ends(self) -> tuple[float, float]:
        return self.low, self.top

    def representative(self) -> float:
        """The middle: arithmetic, or geometric for log ranges; rounded to a whole number or a step."""
        if self.step is not None:
            return self._at(self._steps() // 2)
        if self.log:
            middle = math.exp(math.log(self.low) / 2 + math.log(self.high) / 2)
        else:
            middle = self.low / 2 + self.high / 2
        middle = min(max(float(f"{middle:.6g}"), self.low), self.high)
        return round(middle) if self.whole else middle

    def suggest(self, trial: Trial, name: str) -> float:
        if self.whole:
            return trial.suggest_int(name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(name, self.low, self.top, step=self.step, log=self.log)

    def accept(self, value: Any) -> float:
        """`value` as a number of this range; raises ValueError for any other."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(value)
        if self.step is not None:
            steps = (value - self.low) / self.step
            if abs(steps - round(steps)) > 1e-8 or not 0 <= round(steps) <= self._steps():
                raise ValueError(value)
        elif not self.low <= value <= self.high or (self.whole and value != int(value)):
            raise ValueError(value)
        return int(value) if self.whole else float(value)

    def _at(self, index: int) -> float:
        return float(Decimal(str(self.low)) + index * Decimal(str(self.step)))

    def _steps(self) -> int:
        return int((Decimal(str(self.high)) - Decimal(str(self.low))) // Decimal(str(self.step)))


@dataclass(frozen=True)
class Choice:
    """One of several entries, each a scalar, a list, a branch, or a distribution of its own.

    Optuna sees the labels: a scalar is its own label, a branch is labelled by its `kind`.
    """

    labels: tuple[Scalar, ...]
    entries: tuple[Node, ...]
    name = "choice"

    def __str__(self) -> str:
        shown = (label if isinstance(label, str) else show(label) for label in self.labels)
        return f"choice: [{', '.join(shown)}]"

    def ends(self) -> tuple[Scalar, ...]:
        return self.labels

    def representative(self) -> Scalar:
        return self.labels[0]

    def suggest(self, trial: Trial, name: str) -> Scalar:
        return trial.suggest_categorical(name, self.labels)

    def accept(self, label: Any) -> Scalar:
        """The label that equals `label`; raises ValueError if none does."""
        return self.labels[self.labels.index(label)]

    def entry(self, label: Scalar) -> Node:
        return self.entries[self.labels.index(label)]


Distribution = Range | Choice

# ------------------------------------------------------------------------------------- reading

Report = Callable[..., None]
"""`report(problem, line=, key=, allowed=)`: `Problems.add`."""


def find_distribution(node: Node) -> str | None:
    """The name of the distribution that a mapping writes: its key whose value is a list."""
    if isinstance(node.value, dict):
        for name, value in node.value.items():
            if (name in FORMS or name in _UNSUPPORTED) and isinstance(value.value, tuple):
                return name
    return None


def read_tree(node: Node, key: Key, report: Report) -> Node:
    """`node` with every distribution in it read; what is wrong with them is reported and left out."""
    if (name := find_distribution(node)) is not None:
        return Node(_read_distribution(name, node, key, report), node.line)
    if isinstance(node.value, dict):
        return Node({k: read_tree(v, (*key, k), report) for k, v in node.value.items()}, node.line)
    if isinstance(node.value, tuple):
        return Node(tuple(read_tree(v, (*key, i), report) for i, v in enumerate(node.value)), node.line)
    return node


def _read_distribution(name: str, node: Node, key: Key, report: Report) -> Distribution | None:
    line = node.value[name].line
    if name in _UNSUPPORTED:
        problem = f"the distribution '{name}' is not offered: {_UNSUPPORTED[name]}"
        report(problem, line=line, key=key, allowed=", ".join(FORMS))
        return None
    if len(node.value) > 1:
        other = next(other for other in node.value if other != name)
        problem = f"the distribution '{name}' must stand alone, but the key '{other}' stands beside it"
        report(problem, line=line, key=key, allowed=FORMS[name])
        return None
    items = node.value[name].value
    if name == "choice":
        return _read_choice(items, line, key, report)
    numbers = [item.value for item in items]
    wrong = _range_problem(name, numbers)
    if wrong is not None:
        report(f"{name}: {wrong}", line=line, key=key, allowed=FORMS[name])
        return None
    if name not in ("int", "logint"):
        numbers = [float(number) for number in numbers]
    return Range(name, *numbers)


def _range_problem(name: str, values: list[Any]) -> str | None:
    """What is wrong with the numbers of a range; None if nothing is."""
    names = FORMS[name].partition("[")[2].rstrip("]}").split(", ")
    if len(values) != len(names):
        return f"takes {len(names)} values, got {len(values)}"
    for what, value in zip(names, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float):
            written = show(value) if isinstance(value, Scalar) else "a list or a mapping"
            return f"{what} must be a number, got {written}"
        if not math.isfinite(value):
            return f"{what} must be finite, got {value}"
        if name in ("int", "logint") and not isinstance(value, int):
            return f"{what} must be a whole number, got {value}"
    low, high, *rest = values
    if low > high:
        return f"low {low} is above high {high}"
    if name.startswith("log") and low <= 0:
        return f"low must be above 0 on a log scale, got {low}"
    for step in rest:
        if step <= 0:
            return f"step must be above 0, got {step}"
        if high - low < step and low != high:
            return f"step {step} is larger than the range from {low} to {high}"
        if (high - low) / step > _MOST_STEPS:
            return f"more than {_MOST_STEPS:,} steps: use uniform"
    return None


def _read_choice(items: tuple[Node, ...], line: int, key: Key, report: Report) -> Choice | None:
    if not items:
        report("choice: has no entries", line=line, key=key, allowed=FORMS["choice"])
        return None
    if len(items) > _MOST_ENTRIES:
        report(f"choice: more than {_MOST_ENTRIES:,} entries: use a range", line=line, key=key)
        return None
    entries = tuple(read_tree(item, key, report) for item in items)
    names = [_label(entry) for entry in entries]
    labels: list[Scalar] = []
    for index, (name, entry) in enumerate(zip(names, entries, strict=True)):
        twin = not isinstance(entry.value, Scalar) and names.count(name) > 1
        label = f"{name}#{index}" if twin else name
        if entry in entries[:index] or label in labels:
            report(f"choice: {show(name)} is there twice", line=entry.line, key=key)
            return None
        labels.append(label)
    return Choice(tuple(labels), entries)


def _label(entry: Node) -> Scalar:
    """A short name: scalars stand for themselves, `kind` for a branch, `512-256` for a list."""
    value = entry.value
    if isinstance(value, Distribution):
        return value.name
    if isinstance(value, tuple):
        items = [item.value for item in value]
        if not all(isinstance(item, Scalar) for item in items):
            return "list"
        return "-".join(map(str, items)) if len(items) > 1 else str(items)
    if isinstance(value, dict):
        if "kind" in value and isinstance(value["kind"].value, str):
            return value["kind"].value
        scalars = {
            k: v.value for k, v in value.items() if not isinstance(v.value, tuple | dict | Distribution)
        }
        return ", ".join(f"{k}={v}" for k, v in scalars.items()) or "branch"
    return value
