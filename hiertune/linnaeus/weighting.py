"""`LOSS.GRAD_WEIGHTING.TASK` as the section `weighting`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hiertune.linnaeus.context import Context
from hiertune.linnaeus.settings import number_of

_TASK = "LOSS.GRAD_WEIGHTING.TASK"


def weighting_section(context: Context) -> dict[str, Any]:
    settings = context.settings
    kind = settings.choice(f"{_TASK}.TYPE", "gradnorm", ("static", "gradnorm"))
    enabled = settings.flag(f"{_TASK}.GRADNORM_ENABLED", True)
    given = settings.sequence(f"{_TASK}.INIT_WEIGHTS", [], number_of, "a list of numbers")
    if given and len(given) != len(context.tasks):
        raise settings.refuse(
            f"{_TASK}.INIT_WEIGHTS", f"got {len(given)} numbers", f"{len(context.tasks)}, one per level"
        )
    for name in ("TYPE", "GRADNORM_ENABLED"):
        settings.carry(f"{_TASK}.{name}", "weighting.kind")
    if kind == "gradnorm" and enabled:
        settings.drop(f"{_TASK}.INIT_WEIGHTS", "gradnorm starts from what weighting.initial_weights names")
        return _gradnorm(context)
    if given:
        settings.carry(f"{_TASK}.INIT_WEIGHTS", "weighting.weights")
        weighting: dict[str, Any] = {
            "kind": "fixed",
            "weights": {
                context.levels[task]: weight
                for task, weight in reversed(list(zip(context.tasks, given, strict=True)))
            },
        }
        settings.drop(f"{_TASK}.INIT_STRATEGY", f"{_TASK}.INIT_WEIGHTS says it")
        context.differs.append(
            "fixed weights are scaled to sum to the number of levels; Linnaeus takes them as they are"
        )
    else:
        weighting = {"kind": "equal"}
        settings.carry(f"{_TASK}.INIT_WEIGHTS", "weighting.kind")
        settings.drop(
            f"{_TASK}.INIT_STRATEGY", "fixed weights must be numbers (in Linnaeus it has no effect either)"
        )
    settings.drop_rest(_TASK, "there is no GradNorm in this experiment")
    return weighting


def _gradnorm(context: Context) -> dict[str, Any]:
    settings = context.settings
    keys = {
        "ALPHA": "alpha",
        "UPDATE_INTERVAL": "interval",
        "GRADNORM_WARMUP_STEPS": "warmup_steps",
        "GRADNORM_ACCUM_STEPS": "accumulate",
        "INIT_STRATEGY": "initial_weights",
        "USE_LINEAR_HEADS_FOR_GRADNORM_REFORWARD": "linear_heads",
    }
    for name, ours in keys.items():
        settings.carry(f"{_TASK}.{name}", f"weighting.{ours}")
    context.differs += [
        "GradNorm follows the paper: a level with large gradients or a fast falling loss is turned down;"
        " Linnaeus turns it up",
        "GradNorm's start weights follow INIT_STRATEGY; in Linnaeus they are all 1",
    ]
    if context.accumulation > 1 or settings.whole(f"{_TASK}.GRADNORM_ACCUM_STEPS", 1) > 1:
        context.differs.append(
            "weighting.accumulate measures all forward passes of a step; GRADNORM_ACCUM_STEPS cuts one batch"
        )
    return {
        "kind": "gradnorm",
        "alpha": settings.number(f"{_TASK}.ALPHA", 1.5),
        "interval": settings.whole(f"{_TASK}.UPDATE_INTERVAL", 100),
        "warmup_steps": settings.whole(f"{_TASK}.GRADNORM_WARMUP_STEPS", 0),
        "accumulate": settings.whole(f"{_TASK}.GRADNORM_ACCUM_STEPS", 1) > 1,
        "initial_weights": settings.choice(
            f"{_TASK}.INIT_STRATEGY", "inverse_density", ("inverse_density", "class_complexity")
        ),
        "at": "backbone",
        "exclude": _exclude(context),
        "linear_heads": settings.flag(f"{_TASK}.USE_LINEAR_HEADS_FOR_GRADNORM_REFORWARD", True),
    }


def _exclude(context: Context) -> dict[str, Any]:
    settings, section = context.settings, f"{_TASK}.EXCLUDE_CONFIG"
    written = {
        key.removeprefix(f"{section}."): entry.value
        for key, entry in settings.entries.items()
        if key.startswith(f"{section}.")
    }
    found: dict[str, list[str]] = {"names": [], "patterns": [], "types": []}
    settings.sequence(f"{section}.FILTERS", [], _filter, "a list of filters, each with a TYPE")
    reason = _collect({"TYPE": "or", **written}, found) if written else None
    if reason is None:
        settings.carry_rest(section, "weighting.exclude")
        return {name: list(dict.fromkeys(items)) for name, items in found.items() if items}
    settings.drop_rest(section, f"hiertune's weighting.exclude cannot express {reason}")
    return {}


def _filter(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or "TYPE" not in value:
        raise ValueError(value)
    return value


def _collect(config: Any, found: dict[str, list[str]]) -> str | None:
    """Add what a filter of Linnaeus' matches to `found`; what it is where that cannot be said."""
    if not isinstance(config, Mapping):
        return "a filter that is no mapping"
    kind = str(config.get("TYPE", "")).lower()
    if kind == "or":
        parts = config.get("FILTERS") or []
        return next((reason for part in parts if (reason := _collect(part, found))), None)
    if kind not in ("name", "layer_type"):
        return f"a filter of type '{kind}'"
    items = config.get("PATTERNS" if kind == "name" else "LAYER_TYPES", [])
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        return "patterns that are no list of texts"
    if kind == "layer_type":
        found["types"] += items
        return None
    forms = {"contains": "{}", "startswith": "^{}", "endswith": "{}$"}
    match = str(config.get("MATCH_TYPE", "contains")).lower()
    if match == "regex":
        return _collect_regexes(items, found)
    if match not in forms:
        return f"the match type '{match}'"
    for item in items:
        if item.strip(".") == "head":
            found["names"].append("head")  # the heads, not what has "multihead" in its name
        else:
            found["patterns"].append(forms[match].format(re.escape(item)))
    return None


def _collect_regexes(items: list[str], found: dict[str, list[str]]) -> str | None:
    for item in items:
        try:
            re.compile(item)
        except re.error:
            return f"'{item}', which is no regular expression"
    found["patterns"] += items
    return None
