"""summary.json of a finished search, read with every key that is used of it checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from hiertune.config import SearchSection
from hiertune.errors import InputError

DECODE_OFF = "search.decode is off"
"""Why there is no rule for the winner's logits where none was asked for."""
Seconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Metrics = dict[str, float]


class _Objective(TypedDict):
    metric: str
    mode: Literal["max", "min"]


class _Comparison(TypedDict):
    rows: int
    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None


class _BeforeAndAfter(TypedDict):
    before: Metrics
    after: Metrics


class _Decoding(TypedDict):
    rule: dict[str, Any] | None
    name: NotRequired[str | None]
    tried: NotRequired[int]
    val: NotRequired[_BeforeAndAfter | None]
    test: NotRequired[Metrics | None]


class _Winner(TypedDict):
    trial: int
    metrics: Metrics
    decoding: NotRequired[_Decoding]


class _Control(TypedDict):
    metrics: Metrics
    against_winner: NotRequired[_Comparison | None]


class _Data(TypedDict):
    path: str
    fingerprint: str
    rows: int


class _Tracking(TypedDict):
    uri: str
    delivered: int
    total: int


class _Summary(TypedDict):
    objective: _Objective
    trials: dict[str, int]
    winner: _Winner
    controls: dict[str, _Control]
    seconds: Seconds
    seed: int
    refit: bool
    versions: dict[str, str | None]
    data: _Data
    tracking: NotRequired[_Tracking]


class _Measured(TypedDict):
    metrics: Metrics


class _HasWinner(TypedDict):
    winner: _Measured


_WHOLE: TypeAdapter[Any] = TypeAdapter(_Summary)
_WINNER: TypeAdapter[Any] = TypeAdapter(_HasWinner)


def read_summary(path: Path) -> dict[str, Any]:
    """The summary as it was written. InputError for a file that is damaged, or no summary."""
    return _read(path, _WHOLE)


def read_winner_metrics(path: Path) -> dict[str, float]:
    """The metrics of the winner alone, whatever else is in the file. InputError as `read_summary`."""
    return _read(path, _WINNER)["winner"]["metrics"]


def missing_in(summary: Mapping[str, Any], search: SearchSection) -> list[str]:
    """The settings of a search's end that ask for what its summary has not, or has otherwise."""
    return [name for name in _differing(summary, search) if name == "refit" or getattr(search, name)]


def beyond(summary: Mapping[str, Any], search: SearchSection) -> list[str]:
    """The settings of a search's end that are off, while its summary has what they would give."""
    return [name for name in _differing(summary, search) if name != "refit" and not getattr(search, name)]


def _differing(summary: Mapping[str, Any], search: SearchSection) -> list[str]:
    decoding = summary["winner"].get("decoding", {"reason": DECODE_OFF})  # older summaries have none
    had = {
        "controls": bool(summary["controls"]),
        "refit": summary["refit"],
        "decode": decoding.get("reason") != DECODE_OFF,
    }
    return [name for name, value in had.items() if value != getattr(search, name)]


def _read(path: Path, adapter: TypeAdapter[Any]) -> dict[str, Any]:
    allowed = "the summary of a finished search"
    try:
        summary = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"can't be read: {error}", file=path, allowed=allowed) from error
    try:
        adapter.validate_python(summary, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part)[:100] for part in first["loc"])
        raise InputError(f"is no summary: {first['msg']}", file=path, key=key, allowed=allowed) from error
    return summary
