"""The keys of a Linnaeus experiment as a config: one function per section of hiertune's.

A key that is left out has the default that Linnaeus gives it, but for the model: Linnaeus' own models
are not carried over. What the result does otherwise than Linnaeus, on purpose or because the file
leaves it open, is said in a line each.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hiertune._problems import explain
from hiertune._yaml import dump_yaml, key_text
from hiertune.config import TrialConfig
from hiertune.errors import InputError
from hiertune.linnaeus.context import Context, DataFacts, make_context
from hiertune.linnaeus.loss import loss_section
from hiertune.linnaeus.mixing import mix_section, unknown_section
from hiertune.linnaeus.model import model_section
from hiertune.linnaeus.settings import Outcome, Settings, read_settings, suggestion
from hiertune.linnaeus.training import optimisation_section
from hiertune.linnaeus.weighting import weighting_section
from hiertune.space import dump_config


@dataclass(frozen=True)
class Imported:
    """A Linnaeus experiment as a config, and an account of every key."""

    file: Path
    name: str
    config: TrialConfig
    outcomes: tuple[Outcome, ...]
    checks: tuple[str, ...]
    """What the file does not say, and what was taken: check these."""
    differs: tuple[str, ...]
    """What hiertune does otherwise with these settings."""

    @property
    def counts(self) -> str:
        carried = sum(outcome.to is not None for outcome in self.outcomes)
        unknown = sum(outcome.unknown for outcome in self.outcomes)
        dropped = len(self.outcomes) - carried - unknown
        keys = "key" if carried == 1 else "keys"
        return f"{carried} {keys} carried over, {dropped} not, {unknown} unknown"

    def yaml(self) -> str:
        """The config as a file: for `hiertune train`, or to be made a space."""
        head = f"# From the Linnaeus experiment {self.file.name}: {self.counts}.\n"
        return head + dump_yaml({"name": self.name}) + dump_config(self.config)

    def account(self) -> str:
        """Every key that was not carried over and why, then what is open, then what will differ."""
        dropped = [f"{_place(o)}: {o.key}: {o.reason}" for o in self.outcomes if o.reason is not None]
        unknown = [
            f"{_place(o)}: {o.key}: Linnaeus documents no such key{suggestion(o.key)}"
            for o in self.outcomes
            if o.unknown
        ]
        parts = {
            "not carried over": dropped,
            "unknown": unknown,
            "to be checked": self.checks,
            "what will differ": self.differs,
        }
        text = f"{self.file}: {self.counts}\n"
        for title, lines in parts.items():
            text += "".join([f"\n{title}:\n", *(f"  {line}\n" for line in lines)]) if lines else ""
        return text


def _place(outcome: Outcome) -> str:
    return f"{outcome.file}:{outcome.line}"


def import_experiment(
    file: Path, names: Sequence[str] | None = None, facts: DataFacts | None = None
) -> Imported:
    """The experiment in `file` (and in the files that it includes) as a config.

    Args:
        names: what the levels are called in the data, coarse to fine; by default as in DATA.TASK_KEYS_H5.
        facts: the data set to train on; without it the config names a file that is to be made.

    Raises InputError that names file, line, key, value and what is allowed.
    """
    return convert(read_settings(file), names, facts)


def convert(
    settings: Settings, names: Sequence[str] | None = None, facts: DataFacts | None = None
) -> Imported:
    """`import_experiment` for settings that were read."""
    context = make_context(settings, names, facts)
    tree = {
        "data": data_section(context),
        "model": model_section(context),
        "loss": loss_section(context),
        "weighting": weighting_section(context),
        "mix": mix_section(context),
        "unknown": unknown_section(context),
        **optimisation_section(context),
    }
    try:
        config = TrialConfig.model_validate(tree)
    except ValidationError as error:
        raise _refused(settings, error) from None
    name = _run_name(settings)
    return Imported(
        settings.file, name, config, settings.outcomes(), tuple(context.checks), tuple(context.differs)
    )


def data_section(context: Context) -> dict[str, Any]:
    context.settings.carry("DATA.TASK_KEYS_H5", "the names of the levels, coarse to fine")
    if context.facts is None:
        levels = ", ".join(context.levels[task] for task in context.tasks[::-1])
        context.checks.append(
            f"data.path: make this file with `hiertune data import-linnaeus`, with the levels {levels}"
        )
        return {"path": "data.h5"}
    return {"path": context.facts.path}


def _refused(settings: Settings, error: ValidationError) -> InputError:
    """What pydantic found first, at the key of Linnaeus' that the value came from."""
    key, problem, allowed = explain(error.errors(include_url=False)[0], {})
    target = key_text(key).replace("[", ".[")
    if (entry := settings.carried_to(target)) is not None:
        return InputError(problem, file=entry.file, line=entry.line, key=entry.key, allowed=allowed)
    return InputError(problem, file=settings.file, key=target, allowed=allowed)


def _run_name(settings: Settings) -> str:
    """A name that a space may have, from the experiment's or the file's."""
    key = "EXPERIMENT.NAME"
    written = str(settings.entries[key].value) if settings.given(key) else ""  # it may look like a number
    settings.carry(key, "name")
    names = (
        re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-")[:100] for name in (written, settings.file.stem)
    )
    return next(filter(None, names), "linnaeus")
