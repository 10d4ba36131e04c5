"""A YAML file with distributions in place of values: checked, then sampled into configs.

A mapping with one of these keys and a list stands for a value, anywhere in the trial's sections
(data, model, loss, weighting, mix, unknown, optimizer, schedule, train):

    {uniform: [low, high]}         {int: [low, high]}
    {loguniform: [low, high]}      {logint: [low, high]}
    {quniform: [low, high, step]}  {choice: [first, second, ...]}

Both ends belong to a range. The entries of a choice are scalars, lists, or whole branches, which may
hold distributions themselves: those exist only in trials that take the branch. (There is no
`normal`: Optuna cannot sample it, and a transformed uniform would be reported as a quantile.)

A parameter's name is its key path, `model.head.temperature`. Where two branches of a choice give
one path different distributions, the name says which branch: `model.head[conditional].temperature`.
A distribution that is itself an entry of a choice is named after that choice: `train.lr[uniform]`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hiertune._distributions import Choice, Distribution, Range, Trial, read_tree
from hiertune._match import Mismatch, match
from hiertune._problems import Origins, Problems
from hiertune._schema import json_schema
from hiertune._tree import (
    Parameter,
    Pick,
    Picks,
    combinations,
    corner_picks,
    first_distribution,
    lines_of,
    parameters_of,
    picker,
    resolve_tree,
    size_of,
    without_distributions,
)
from hiertune._yaml import Key, Node, Scalar, dump_yaml, key_text, parse_yaml, read_yaml, show, shown_key
from hiertune.config import Config, DataConfig, SearchConfig, TimmConfig, TrialConfig
from hiertune.errors import InputError

__all__ = [
    "Choice",
    "Mismatch",
    "Parameter",
    "Range",
    "Resolved",
    "Space",
    "dump_config",
    "flatten",
    "json_schema",
    "load_config",
    "load_space",
    "located",
    "parse_space",
]


def located(config: TrialConfig, folder: Path) -> TrialConfig:
    """`config` with its paths, which start in `folder`, made absolute."""

    def absolute(path: str) -> str:
        return str((folder / Path(path).expanduser()).resolve())

    data, model = config.data, config.model
    if not data.path.startswith("builtin:"):
        data = data.model_copy(update={"path": absolute(data.path)})
    if isinstance(model.backbone, TimmConfig) and model.backbone.weights is not None:
        weights = absolute(model.backbone.weights)
        model = model.model_copy(update={"backbone": model.backbone.model_copy(update={"weights": weights})})
    return config.model_copy(update={"data": data, "model": model})


@dataclass(frozen=True)
class Resolved:
    """A config, and where in the file each of its values stands."""

    config: TrialConfig
    origins: Origins


@dataclass(frozen=True)
class Space:
    """A checked space file; immutable, and made of plain data, so it pickles.

    `config` is what is not searched, `parameters` what is, in the order of the file. `suggest`
    takes an Optuna trial; every other way to a config goes through the same code.
    """

    config: SearchConfig
    parameters: tuple[Parameter, ...]
    text: str = field(repr=False)
    """The file as it was read."""
    file: Path | None
    tree: Node = field(repr=False)
    """The trial's sections, with distributions read: equal for files that search the same."""
    _names: dict[Key, str] = field(repr=False)
    _lines: dict[str, int] = field(repr=False)

    # ------------------------------------------------------------------------------- configs

    def suggest(self, trial: Trial) -> TrialConfig:
        """Ask `trial` for every parameter of the branches it takes, and build the config.

        Raises InputError if the values break a rule of the config between them.
        """
        return self._build(lambda address, dist: dist.suggest(trial, self._names[address])).config

    def resolve(self, params: Mapping[str, Any]) -> TrialConfig:
        """The config of an Optuna trial's parameters; the inverse of what `suggest` asked for.

        Raises InputError for a parameter that is missing, unknown or outside its distribution.
        """
        unused = dict(params)

        def pick(address: Key, distribution: Distribution) -> Any:
            name = self._names[address]
            if name not in unused:
                raise InputError("the parameter has no value", file=self.file, key=name)
            value = unused.pop(name)
            try:
                return distribution.accept(value)
            except ValueError:
                problem = f"{show(value)} is not in {distribution}"
                raise InputError(problem, file=self.file, key=name) from None

        resolved = self._build(pick)
        if unused:
            raise InputError(
                "the space has no such parameter in the branches taken", file=self.file, key=min(unused)
            )
        return resolved.config

    def params_of(self, config: TrialConfig) -> dict[str, Any]:
        """Parameters that resolve to `config`; raises Mismatch, with the first key that no trial has so.

        Where the data lies may differ: `data.path` is not compared.
        """
        wanted = config.model_dump(mode="json")

        def complete(picks: Picks) -> Any:
            return self._build(picker(picks)).config.model_dump(mode="json")

        try:
            picks = match(self.tree, wanted, complete)
        except Mismatch:
            picks = match(self.tree, wanted, complete, ignore=("data", "path"))
        return {self._names[address]: value for address, value in picks.items()}

    def defaults(self) -> TrialConfig:
        """The plain defaults: the first entry of each choice, the middle of each range.

        The middle is geometric on a log scale, and rounded for whole numbers and steps.
        """
        return self._build(picker({})).config

    def corners(self) -> Iterator[Resolved]:
        """The configs that were checked when the space was read.

        The defaults; then, for every distribution of every branch, the defaults of that branch with
        each entry or either end in turn; then pairs of those for two distributions in one mapping
        (there a rule of the config may tie two values), of a choice its first eight entries. Their
        number grows with the square of what one mapping holds, never with the product over the space.
        """
        for picks in corner_picks(self.parameters):
            yield self._build(picker(picks))

    def data_configs(self) -> list[DataConfig]:
        """Every `data` section that a trial can have; the other sections do not depend on it."""
        every = combinations(self.tree.value["data"], ("data",))
        return [self._build(picker(picks)).config.data for picks in every]

    def _build(self, pick: Pick) -> Resolved:
        tree, origins = resolve_tree(self.tree, pick)
        try:
            return Resolved(TrialConfig.model_validate(tree), origins)
        except ValidationError as error:
            problems = Problems(self.file)
            problems.add_validation(error, origins)
            problems.raise_any()
            raise

    # ----------------------------------------------------------------------- what it looks like

    @property
    def folder(self) -> Path:
        """Where relative paths in the file start."""
        return self.file.parent if self.file else Path()

    @property
    def max_epochs(self) -> int:
        """The most epochs that a trial may train."""
        return max(corner.config.train.epochs for corner in self.corners())

    @property
    def fixed(self) -> dict[str, Any]:
        """The tree of the trial's sections as written, with the distributions left out."""
        return without_distributions(self.tree)

    def line_of(self, key: str) -> int | None:
        """The line of a key path, or of what encloses it where it is not written down.

        Inside a choice of branches this is the first branch that has the key.
        """
        while key and key not in self._lines:
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        return self._lines.get(key)

    # --------------------------------------------------------------------------------- the grid

    def size(self) -> float:
        """How many different configs there are; inf if any range is continuous."""
        return size_of(self.tree)

    def require_finite(self) -> None:
        """Raise InputError for the first range that a grid cannot enumerate."""
        for parameter in self.parameters:
            if isinstance(parameter.distribution, Range) and parameter.distribution.count == math.inf:
                raise InputError(
                    f"{parameter.distribution} is continuous: a grid cannot try all its values",
                    file=self.file,
                    line=parameter.line,
                    key=parameter.key,
                    allowed="quniform, int, logint or choice; or another sampler",
                )

    def grid(self) -> Iterator[dict[str, Any]]:
        """The parameters of every config, for `resolve` or `enqueue_trial`; the last ones vary fastest."""
        self.require_finite()
        for picks in combinations(self.tree, ()):
            yield {self._names[address]: value for address, value in picks.items()}


# ------------------------------------------------------------------------------------- loading


def load_space(path: str | Path) -> Space:
    """Read and check a space file: every branch and both ends of every range (see `Space.corners`).

    Raises InputError that names file, line, key path, value and what is allowed; up to ten at once.
    """
    path = Path(path)
    text, top = read_yaml(path)
    return _space(text, top, path)


def parse_space(text: str) -> Space:
    """`load_space` for a text that is in no file."""
    return _space(text, parse_yaml(text), None)


def _space(text: str, top: Node, file: Path | None) -> Space:
    problems = Problems(file)
    sections = {key: node for key, node in top.value.items() if key in SearchConfig.model_fields}
    for key, node in sections.items():
        _refuse_distributions(node, (key,), problems)
    trial = {key: node for key, node in top.value.items() if key not in sections}
    root = Node({key: read_tree(node, (key,), problems.add) for key, node in trial.items()}, top.line)
    problems.raise_any()

    parameters, names = parameters_of(root)
    config = _validate(SearchConfig, Node(sections, top.line), problems)
    for picks in corner_picks(parameters):
        _validate(TrialConfig, root, problems, picks)
    problems.raise_any()
    lines = lines_of(Node({**sections, **root.value}, top.line))
    space = Space(config, parameters, text, file, root, names, lines)
    if config.search.sampler.kind == "grid":
        space.require_finite()
    return space


def load_config(path: str | Path) -> TrialConfig:
    """Read a fixed config: the trial's sections, and a `name` that is ignored.

    Raises InputError, also for a space: one with distributions, or with `search` or `tracking`.
    """
    path = Path(path)
    _, top = read_yaml(path)
    problems = Problems(path)
    root = Node({key: node for key, node in top.value.items() if key != "name"}, top.line)
    if (found := first_distribution(root, ())) is not None:
        key, name, line = found
        problem = f"'{name}' is a distribution, but a config is fixed: give this file to `hiertune search`"
        raise InputError(problem, file=path, line=line, key=shown_key(key))
    for section in ("search", "tracking"):
        if section in root.value:
            problem = "is part of a space, not of a config: give this file to `hiertune search`"
            allowed = ", ".join(["name", *TrialConfig.model_fields])
            problems.add(problem, line=root.value[section].line, key=(section,), allowed=allowed)
    problems.raise_any()
    config = _validate(TrialConfig, root, problems)
    problems.raise_any()
    return config


def dump_config(config: TrialConfig) -> str:
    """The YAML text of a config: every value written out, read back by `load_config` unchanged."""
    return dump_yaml(config.model_dump(mode="json"))


def flatten(config: Config) -> dict[str, Scalar]:
    """Every value of a config by its key path; a list is its text, `[512, 256]`."""
    flat: dict[str, Scalar] = {}

    def visit(value: Any, key: Key) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                visit(inner, (*key, name))
        else:
            flat[key_text(key)] = str(value) if isinstance(value, list) else value

    visit(config.model_dump(mode="json"), ())
    return flat


def _validate(model: Any, root: Node, problems: Problems, picks: Picks | None = None) -> Any:
    tree, origins = resolve_tree(root, picker(picks or {}))
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        problems.add_validation(error, origins)
        return None


def _refuse_distributions(node: Node, key: Key, problems: Problems) -> None:
    if (found := first_distribution(node, key)) is not None:
        where, name, line = found
        problem = f"the distribution '{name}' cannot stand here: '{key[0]}' is not searched"
        problems.add(
            problem, line=line, key=where, allowed=f"distributions in {', '.join(TrialConfig.model_fields)}"
        )
