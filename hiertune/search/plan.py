"""What a search is asked to do, checked whole before anything starts. Imports no Ray."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import ValidationError

from hiertune._database import Place, check_reachable, ledger_url, place_of
from hiertune.check import check_with_data, warnings_with_data
from hiertune.config import GridConfig, SearchConfig, SearchSection, TrialConfig
from hiertune.errors import InputError, about
from hiertune.search.capacity import GroupShape, groups_that_fit, local_nodes
from hiertune.search.mirror import bring_back, is_behind
from hiertune.search.outputs import RunFolder
from hiertune.space import Space, load_space, located
from hiertune.storage import Folder, open_storage
from hiertune.tracking import check_uri, resolve_uri

if TYPE_CHECKING:
    from hiertune.data import HierarchicalDataset


@dataclass(frozen=True)
class SearchPlan:
    """A search, ready to run."""

    space: Space
    config: SearchConfig
    data: HierarchicalDataset
    folder: RunFolder
    trials: int
    """How many trials the search shall have in all, those of earlier runs included."""
    tracking_uri: str
    resume: bool
    ledger: Place
    warnings: tuple[str, ...] = ()
    """What can be searched, but is seldom meant."""
    given: Mapping[str, str] = field(default_factory=dict)
    """Options that were given instead of the file's, as typed: a resumed search needs them again."""
    bare: bool = False
    """Whether the search to go on with was killed before anything was recorded, and begins again."""
    behind: bool = False
    """Whether storage has more of the search than the run folder; only of a dry run."""

    @property
    def metric(self) -> str:
        return self.config.search.objective.metric or f"val/accuracy/{self.data.taxonomy.levels[-1]}"

    @property
    def mode(self) -> Literal["max", "min"]:
        return self.config.search.objective.mode

    @property
    def fit_on(self) -> tuple[str, ...]:
        """The splits on which the winner is trained once more."""
        return ("train", "val") if self.config.search.refit else ("train",)

    def located(self, config: TrialConfig) -> TrialConfig:
        """`config` with absolute paths: workers run in other folders."""
        return located(config, self.space.folder)


def plan_search(
    file: Path,
    runs: Path,
    *,
    name: str | None = None,
    trials: int | None = None,
    time_budget: str | None = None,
    resume: bool | None = False,
    dry_run: bool = False,
    probe: bool = True,
) -> SearchPlan:
    """Read and check a space file with all that it refers to.

    Args:
        file: the space file.
        runs: folder in which `<name>/` is made.
        name: instead of the file's own.
        trials: instead of the file's own; with `resume`, the number to extend to.
        time_budget: instead of the file's own: seconds, or with a unit.
        resume: go on with the search of that name; None: if it was begun.
        dry_run: what storage has of a search that goes on stays there; else it is brought to the run folder.
        probe: write a file to storage, and remove it again; else storage is only looked at.

    Raises:
        InputError: for anything that would keep the search from running. Nothing was made then, but perhaps
            the run folder from what storage has.
    """
    space = load_space(file)
    config = with_options(space.config, name, time_budget)
    folder = RunFolder(runs.resolve() / config.name)
    folder.require_writable()
    folder.require_own()
    if resume is False:
        folder.require_new()
    folder = RunFolder(folder.root, _storage(space, config, folder.root, probe))
    uri = resolve_uri(config.tracking.uri, runs)
    if uri != f"sqlite:///{runs.resolve()}/mlflow.db":  # that one is made with the runs folder
        line = space.line_of("tracking.uri")
        with about(space.file, line) if config.tracking.uri else about("MLFLOW_TRACKING_URI"):
            check_uri(uri)
    if not os.environ.get("RAY_ADDRESS"):
        nodes = local_nodes()
        groups_that_fit(GroupShape.of(config.search, nodes), nodes, file=str(file))
    data = _open_data(space, file.parent)
    check_with_data(space, data)
    wanted = trials or config.search.trials
    if isinstance(config.search.sampler, GridConfig):
        wanted = int(min(wanted, space.size()))
    behind = False
    if resume is not False and dry_run:
        behind = is_behind(folder)
    elif resume is not False:
        bring_back(folder)  # after all else: what it makes stays
    if resume is None:
        resume = folder.begun or folder.is_bare or behind
    ledger = _ledger_of(space, config, folder, resume, behind)
    given = {"trials": trials, "time-budget": time_budget}
    return SearchPlan(
        space,
        config,
        data,
        folder,
        wanted,
        uri,
        resume,
        ledger,
        tuple(warnings_with_data(space, data)),
        {option: str(value) for option, value in given.items() if value is not None},
        resume and folder.is_bare,
        behind,
    )


def _storage(space: Space, config: SearchConfig, root: Path, probe: bool) -> Folder | None:
    """The search's own folder in storage, which answers. A path starts where the space file is."""
    where: dict[str, Any] = {"file": space.file, "line": space.line_of("storage")}
    text = config.storage
    if text is None:
        text, where = os.environ.get("HIERTUNE_STORAGE"), {"file": "HIERTUNE_STORAGE"}
    elif "://" not in text:
        text = str(space.folder / Path(text).expanduser())
    if not text:
        return None
    storage = open_storage(text, writing=probe, **where).child(config.name)
    if str(storage) == str(root):
        raise InputError("is the runs folder itself", key="storage", allowed="another place", **where)
    return storage


def with_options(config: SearchConfig, name: str | None, time_budget: str | None) -> SearchConfig:
    """`config` with what is given on the command line instead; InputError for a bad value."""
    if name is not None:
        config = _renamed(config, name)
    if time_budget is not None:
        config = _with_time_budget(config, time_budget)
    return config


def _renamed(config: SearchConfig, name: str) -> SearchConfig:
    try:
        return SearchConfig.model_validate({**config.model_dump(), "name": name})
    except ValidationError as error:
        raise InputError(f"--name {name!r}: {_message(error)}") from None


def _with_time_budget(config: SearchConfig, text: str) -> SearchConfig:
    seconds: str | float
    try:
        seconds = float(text)  # as in YAML, where a number needs no quotes
    except ValueError:
        seconds = text
    try:
        section = {**config.search.model_dump(), "time_budget": seconds}
        return config.model_copy(update={"search": SearchSection.model_validate(section)})
    except ValidationError as error:
        raise InputError(f"--time-budget {text!r}: {_message(error)}") from None


def _message(error: ValidationError) -> str:
    return error.errors()[0]["msg"].removeprefix("Value error, ")


def _open_data(space: Space, folder: Path) -> HierarchicalDataset:
    """The data of the space's defaults, after every other data section was opened and compared."""
    from hiertune.data import SPLITS, open_dataset  # loads torch: a broken space is told before that

    first, *others = [open_dataset(config, folder, require=SPLITS) for config in space.data_configs()]
    for other in others:
        if not np.array_equal(first.ids, other.ids) or not np.array_equal(first.labels, other.labels):
            raise InputError(
                "the data sets of one search must have the same rows, or their trials can't be compared",
                file=space.file,
                line=space.line_of("data"),
                key="data.path",
                allowed=f"the rows of {first.source}",
            )
    return first


def _require_in_database(place: Place, name: str) -> None:
    from hiertune.record import answering, open_storage
    from hiertune.search.ledger import only_search  # loads Optuna

    with answering(place):
        only_search(place, open_storage(place), name)


def _ledger_of(space: Space, config: SearchConfig, folder: RunFolder, resume: bool, behind: bool) -> Place:
    """Where the search's record is or will be; a database has answered by then.

    `behind`: storage has the search, and it is not here (yet).
    """
    try:
        url = ledger_url(config.ledger)
        if not resume:
            folder.require_new()
        elif url is None and not behind:
            folder.require_existing()
        place = place_of(folder.ledger, url, given=config.ledger is not None)
        if place.url is not None:
            here = folder.begun or folder.is_bare
            check_reachable(place.url, new=not resume or folder.is_bare or behind)
            if resume and not here and not behind:
                _require_in_database(place, config.name)
    except InputError as error:
        if error.key != "ledger" or error.file is not None:
            raise
        where: dict[str, Any] = {"file": space.file, "line": space.line_of("ledger")}
        if config.ledger is None:
            where = {"file": "HIERTUNE_LEDGER"}
        raise InputError(error.problem, key=error.key, allowed=error.allowed, **where) from None
    return place
