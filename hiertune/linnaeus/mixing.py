"""`SCHEDULE.MIX`, `SCHEDULE.MIXUP` and null masking as the sections `mix` and `unknown`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hiertune.linnaeus.context import Context
from hiertune.linnaeus.settings import Settings, text_of


def mix_section(context: Context) -> dict[str, Any]:
    settings, keys = context.settings, _MixKeys(context.settings)
    mixup = settings.flag(keys["MIXUP.ENABLED"], True)
    cutmix = settings.flag(keys["CUTMIX.ENABLED"], False)
    sampler = settings.choice("DATA.SAMPLER.TYPE", "grouped", ("grouped", "standard"))
    for key in (keys["ENABLED"], keys["PROB.ENABLED"], keys["MIXUP.ENABLED"], "DATA.SAMPLER.TYPE"):
        settings.carry(key, "mix.kind")
    if cutmix and not context.images:
        settings.drop(keys["CUTMIX.ENABLED"], "the rows of the data are no images")
        cutmix = False
    settings.carry_rest(keys["CUTMIX.ENABLED"], "mix.kind")
    on = settings.flag(keys["ENABLED"], True) and settings.flag(keys["PROB.ENABLED"], True)
    if not on or sampler == "standard" or not (mixup or cutmix):
        for section in _MIX_SECTIONS:
            settings.drop_rest(section, "nothing is mixed in this experiment")
        return {"kind": "none"}
    context.differs.append(
        "a batch is mixed with the probability that is written (Linnaeus: its square), and rows of rare"
        " classes are trained unmixed (Linnaeus: left out)"
    )
    mix: dict[str, Any] = {
        "level": _group_level(context, keys["GROUP_LEVELS"]),
        "probability": _mix_probability(context, keys),
        "min_group_size": max(settings.whole(keys["MIN_GROUP_SIZE"], 4), 2),
        "exclude_unknown": settings.flag(keys["EXCLUDE_NULL_SAMPLES"], False),
    }
    settings.carry(keys["MIN_GROUP_SIZE"], "mix.min_group_size")
    settings.carry(keys["EXCLUDE_NULL_SAMPLES"], "mix.exclude_unknown")
    _null_tasks(context, keys["NULL_TASK_KEYS"])
    return {**mix, **_mix_kind(settings, keys, mixup, cutmix)}


_MIX_SECTIONS = ("SCHEDULE.MIX", "SCHEDULE.MIXUP")
_MIX_SPELLINGS = {
    "PROB.ENABLED": ("PROB.ENABLED", "PROB_SCHEDULE.ENABLED"),
    "PROB.TYPE": ("PROB.TYPE", "PROB_SCHEDULE.TYPE"),
    "PROB.START_PROB": ("PROB.START_PROB", "PROB_SCHEDULE.START_PROB"),
    "PROB.END_PROB": ("PROB.END_PROB", "PROB_SCHEDULE.END_PROB"),
    "PROB.END_STEPS": ("PROB.END_STEPS", "PROB_SCHEDULE.END_STEPS"),
    "PROB.END_FRACTION": ("PROB.END_FRACTION", "PROB_SCHEDULE.END_FRACTION"),
    "MIXUP.ALPHA": ("MIXUP.ALPHA", "ALPHA"),
}


class _MixKeys:
    """The spelling that the file uses of each key of SCHEDULE.MIX; others that say the same are dropped."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._chosen: dict[str, str] = {}

    def __getitem__(self, name: str) -> str:
        if name not in self._chosen:
            spellings = _MIX_SPELLINGS.get(name, (name,))
            keys = [f"{section}.{spelling}" for section in _MIX_SECTIONS for spelling in spellings]
            written = [key for key in keys if self._settings.has(key)]
            self._chosen[name] = written[0] if written else keys[0]
            for other in written[1:]:
                self._settings.drop(other, f"{written[0]} says it")
        return self._chosen[name]


def _group_level(context: Context, key: str) -> str:
    settings = context.settings
    defaults = ["taxa_L40", "taxa_L30", "taxa_L20", "taxa_L10"]
    levels = settings.sequence(key, defaults, text_of, "a list of names out of DATA.TASK_KEYS_H5")
    if not settings.given(key):
        levels = [level for level in levels if level in context.tasks] or [context.tasks[0]]
        context.checks.append(f"mix.level: {context.levels[levels[0]]}, because no GROUP_LEVELS is written")
    if not levels or levels[0] not in context.tasks:
        problem = f"the experiment has no level '{levels[0]}'" if levels else "names no level"
        raise settings.refuse(key, problem, ", ".join(context.tasks))
    settings.carry(key, "mix.level")
    if len(levels) > 1 and settings.given(key):
        context.differs.append(f"of GROUP_LEVELS only the first counts, {levels[0]}, as in Linnaeus")
    return context.levels[levels[0]]


def _mix_probability(context: Context, keys: _MixKeys) -> dict[str, Any]:
    settings = context.settings
    kind = settings.choice(keys["PROB.TYPE"], "linear", ("constant", "linear", "cosine"))
    settings.carry(keys["PROB.TYPE"], "mix.probability.kind")
    named = {name: keys[f"PROB.{name}"] for name in ("START_PROB", "END_PROB", "END_STEPS", "END_FRACTION")}
    start, end = settings.number(named["START_PROB"], 1.0), settings.number(named["END_PROB"], 0.2)
    if kind == "constant":
        settings.carry(named["START_PROB"], "mix.probability.value")
        for name in ("END_PROB", "END_STEPS", "END_FRACTION"):
            settings.drop(named[name], f"{keys['PROB.TYPE']} is constant")
        return {"kind": "constant", "value": start}
    documented = any(
        settings.has(key) and "PROB_SCHEDULE" in key for key in [*named.values(), keys["PROB.TYPE"]]
    )
    until = _until(context, named, "mix.probability.until", 1.0 if documented else 0.0)
    if until == 0.0:
        settings.carry(named["END_PROB"], "mix.probability.value")
        settings.drop(named["START_PROB"], "END_PROB holds from the first step on: no end is given")
        return {"kind": "constant", "value": end}
    settings.carry(named["START_PROB"], "mix.probability.start")
    settings.carry(named["END_PROB"], "mix.probability.end")
    return {"kind": kind, "start": start, "end": end, "until": until}


def _until(context: Context, keys: Mapping[str, str], to: str, default: float) -> float:
    """The share of the training at which a probability reaches its end, from END_FRACTION or END_STEPS."""
    settings, fraction, steps = context.settings, keys["END_FRACTION"], keys["END_STEPS"]
    wanted = settings.whole(steps, 0)
    if settings.given(fraction):
        settings.carry(fraction, to)
        settings.drop(steps, f"{fraction} says it")
        return settings.number(fraction, default)
    settings.drop(fraction, "is None")
    if not settings.given(steps):
        settings.drop(steps, "is None")
        return default
    if wanted <= 0:
        settings.carry(steps, to)
        return 0.0
    share = context.share_of(wanted)
    if share is None:
        settings.drop(
            steps, "the length of the training is not known: give --data or LR_SCHEDULER.TOTAL_STEPS"
        )
        context.checks.append(f"{to}: 1.0, the end of the training, instead of step {wanted}")
        return 1.0
    settings.carry(steps, to)
    return share


def _null_tasks(context: Context, key: str) -> None:
    tasks = context.settings.sequence(key, list(context.tasks), text_of, "a list of names")
    if set(tasks) >= set(context.tasks):
        context.settings.carry(key, "mix.exclude_unknown")
    else:
        context.settings.drop(key, "an unknown label at any level keeps a row from being mixed")


def _mix_kind(settings: Settings, keys: _MixKeys, mixup: bool, cutmix: bool) -> dict[str, Any]:
    both = mixup and cutmix
    names = {"MIXUP.ALPHA": "mixup_alpha", "CUTMIX.ALPHA": "cutmix_alpha"}
    mix: dict[str, Any] = {"kind": "mixup_or_cutmix" if both else "mixup" if mixup else "cutmix"}
    for name, ours in names.items():
        used = mixup if name.startswith("MIXUP") else cutmix
        ours = ours if both else "alpha"
        if used:
            mix[ours] = settings.number(keys[name], 1.0)
            settings.carry(keys[name], f"mix.{ours}")
        else:
            settings.drop(keys[name], f"{keys[name].rpartition('.')[0]} is off")
    if both:
        mix["cutmix_share"] = settings.number(keys["SWITCH_PROB"], 0.5)
        settings.carry(keys["SWITCH_PROB"], "mix.cutmix_share")
    else:
        settings.drop(keys["SWITCH_PROB"], "only one of mixup and cutmix is on")
    return mix


_NULL = "SCHEDULE.NULL_MASKING"


def unknown_section(context: Context) -> dict[str, Any]:
    settings = context.settings
    classes = settings.flag("DATA.PARTIAL.LEVELS", False)
    masked = settings.flag("TRAIN.PHASE1_MASK_NULL_LOSS", False)
    for key in ("DATA.PARTIAL.LEVELS", "TRAIN.PHASE1_MASK_NULL_LOSS"):
        settings.carry(key, "unknown.kind")
    if not classes or masked:
        reason = (
            "TRAIN.PHASE1_MASK_NULL_LOSS" if masked else "without DATA.PARTIAL.LEVELS there is nothing to add"
        )
        settings.drop_rest(_NULL, f"unknown labels are masked throughout: {reason}")
        if not classes:
            context.differs.append(
                "rows with an unknown label train the levels that are known; Linnaeus leaves such rows out"
            )
        return {"kind": "mask"}
    context.differs.append(
        "the outcome 'unknown' exists at levels with unknown labels in training, and is no class of the"
        " taxonomy"
    )
    return {"kind": "outcome", "probability": _null_probability(context)}


def _null_probability(context: Context) -> dict[str, Any]:
    settings = context.settings
    if not settings.flag(f"{_NULL}.ENABLED", False):
        settings.carry(f"{_NULL}.ENABLED", "unknown.probability.kind")
        settings.drop_rest(_NULL, f"{_NULL}.ENABLED is off: every unknown label counts")
        return {"kind": "constant", "value": 1.0}
    settings.carry(f"{_NULL}.ENABLED", "unknown.probability.kind")
    to = "unknown.probability"
    keys = {name: f"{_NULL}.{name}" for name in ("END_FRACTION", "END_STEPS")}
    start, end = settings.number(f"{_NULL}.START_PROB", 0.0), settings.number(f"{_NULL}.END_PROB", 1.0)
    begin, until = _null_window(context, keys, f"{to}.until")
    if until == 0.0:
        settings.carry(f"{_NULL}.END_PROB", f"{to}.value")
        settings.drop(f"{_NULL}.START_PROB", "END_PROB holds from the first step on")
        return {"kind": "constant", "value": end}
    settings.carry(f"{_NULL}.START_PROB", f"{to}.start")
    settings.carry(f"{_NULL}.END_PROB", f"{to}.end")
    return {"kind": "linear", "start": start, "end": end, "begin": begin, "until": until}


def _null_window(context: Context, keys: Mapping[str, str], to: str) -> tuple[float, float]:
    """Where the ramp begins and ends, as shares: by epochs as documented, or by fraction or steps."""
    settings = context.settings
    first, last = f"{_NULL}.START_EPOCH", f"{_NULL}.END_EPOCH"
    if settings.given(keys["END_FRACTION"]) or settings.given(keys["END_STEPS"]):
        for key in (first, last):
            settings.drop(key, f"{_NULL}.END_FRACTION or END_STEPS says it")
        return 0.0, _until(context, keys, to, 1.0)
    settings.drop_rest(keys["END_FRACTION"], "is None")
    settings.drop_rest(keys["END_STEPS"], "is None")
    begin = min(settings.number(first, 0.0) / context.epochs, 1.0)
    settings.carry(first, "unknown.probability.begin")
    if settings.given(last):
        until = min(settings.number(last, 0.0) / context.epochs, 1.0)
        if until < begin:
            raise settings.refuse(last, f"lies before {first}", f"an epoch from {first} on")
        settings.carry(last, to)
        return begin, until
    settings.drop(last, "is None")
    share = context.share_of(15000)
    if share is None:
        context.checks.append(f"{to}: 1.0, the end of the training, instead of step 15000, Linnaeus' default")
        return begin, 1.0
    return begin, max(share, begin)
