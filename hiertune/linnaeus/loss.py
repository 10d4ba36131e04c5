"""`LOSS.TASK_SPECIFIC`, `LOSS.TAXONOMY_SMOOTHING` and class weights as the section `loss`."""

from __future__ import annotations

from typing import Any

from hiertune.linnaeus.context import Context
from hiertune.linnaeus.settings import flag_of, number_of, text_of

PARTIAL_CLADE_SHARE = 0.9
"""What `PARTIAL_SUBTREE_WEIGHTING: True`, which names no number, becomes."""


_SMOOTHING = "LOSS.TAXONOMY_SMOOTHING"
_FUNCS = "LOSS.TASK_SPECIFIC.TRAIN.FUNCS"
_TAXONOMY, _UNIFORM = "TaxonomyAwareLabelSmoothing", "LabelSmoothingCrossEntropy"
_LOSSES = ("CrossEntropyLoss", "SoftTargetCrossEntropy", _UNIFORM, _TAXONOMY)


def loss_section(context: Context) -> dict[str, Any]:
    settings = context.settings
    losses = {name.lower(): name for name in _LOSSES}
    what = f"one of {', '.join(_LOSSES)}"
    wanted = settings.per_task(
        _FUNCS, _LOSSES[0], context.tasks, lambda value: losses[text_of(value).lower()], what
    )
    settings.carry(_FUNCS, "loss.kind")
    weights = _class_weights(context)
    smoothing = settings.number("MODEL.LABEL_SMOOTHING", 0.1)
    if _UNIFORM in wanted:
        settings.carry("MODEL.LABEL_SMOOTHING", "loss.smoothing")
    else:
        settings.drop("MODEL.LABEL_SMOOTHING", f"no level has the loss {_UNIFORM}")
    if not 0 <= smoothing < 1:
        raise settings.refuse(
            "MODEL.LABEL_SMOOTHING", f"{smoothing} is out of range", "a number from 0, below 1"
        )
    if _TAXONOMY not in wanted:
        settings.drop_rest(_SMOOTHING, f"no level has the loss {_TAXONOMY}")
        if len({loss == _UNIFORM for loss in wanted}) == 1:
            smoothing = smoothing if _UNIFORM in wanted else 0.0
            return {"kind": "cross_entropy", "smoothing": smoothing, "class_weights": weights}
    return {**_taxonomy_smoothing(context, wanted, smoothing), "class_weights": weights}


def _taxonomy_smoothing(context: Context, wanted: list[str], uniform: float) -> dict[str, Any]:
    """Levels with different losses: those without smoothing are off, evenly smoothed ones have beta 0."""
    settings = context.settings
    tasks = context.tasks
    enabled = settings.per_task(
        f"{_SMOOTHING}.ENABLED", True, tasks, flag_of, "true or false for every level"
    )
    levels: dict[str, dict[str, Any]] = {}
    for task, loss, on in reversed(list(zip(tasks, wanted, enabled, strict=True))):
        if loss == _UNIFORM:
            levels[context.levels[task]] = {"alpha": uniform, "beta": 0.0}
        elif loss != _TAXONOMY or not on:
            levels[context.levels[task]] = {"enabled": False}
        if loss == _TAXONOMY and not on:
            context.differs.append(
                f"{task} trains with plain cross-entropy; Linnaeus stops where it is not ENABLED"
            )
    partial = settings.flag(f"{_SMOOTHING}.PARTIAL_SUBTREE_WEIGHTING", False)
    names = ("ALPHA", "BETA", "UNIFORM_ROOTS", "FALLBACK_TO_UNIFORM")
    alpha, beta, roots, fallback = (f"{_SMOOTHING}.{name}" for name in names)
    for key in (alpha, beta, roots, fallback):
        settings.carry_rest(key, f"loss.{key.rpartition('.')[2].lower()}")
    settings.carry_rest(f"{_SMOOTHING}.ENABLED", "loss.levels")
    settings.carry_rest(f"{_SMOOTHING}.PARTIAL_SUBTREE_WEIGHTING", "loss.clade_share")
    if _TAXONOMY in wanted:
        context.differs += [
            "UNIFORM_ROOTS and FALLBACK_TO_UNIFORM decide about the top level as documented; in Linnaeus the"
            " first has no effect there",
            "a large BETA keeps to the nearest relatives; in Linnaeus rows become uniform above about 10",
        ]
        if partial:
            context.checks.append(
                f"loss.clade_share: {PARTIAL_CLADE_SHARE} was chosen, Linnaeus has no number for"
                " PARTIAL_SUBTREE_WEIGHTING and does not implement it"
            )
    return {
        "kind": "taxonomy_smoothing",
        "alpha": settings.number(alpha, 0.1),
        "beta": settings.number(beta, 1.0),
        "uniform_roots": settings.flag(roots, True),
        "fallback_to_uniform": settings.flag(fallback, True),
        "clade_share": PARTIAL_CLADE_SHARE if partial else 1.0,
        "levels": levels,
    }


_CLASS = "LOSS.GRAD_WEIGHTING.CLASS"
_METHODS = ("none", "smoothing", "capping", "exponential", "logarithmic")
_METHOD_KEYS = {
    "smoothing": ("SMOOTHING_FACTOR", "smoothing", 0.1),
    "capping": ("CAP", "cap", 20.0),
    "exponential": ("BASE", "base", 2.0),
    "logarithmic": ("LOG_BASE", "base", 10.0),
}


def _class_weights(context: Context) -> dict[str, Any]:
    settings = context.settings
    what = f"one of {', '.join(_METHODS)}"
    names = {name: name for name in _METHODS}
    methods = settings.per_task(
        f"{_CLASS}.METHOD", "none", context.tasks, lambda value: names[text_of(value).lower()], what
    )
    parameters = {
        method: settings.per_task(f"{_CLASS}.{name}", default, context.tasks, number_of, "a number")
        for method, (name, _, default) in _METHOD_KEYS.items()
    }
    used, reason = methods[0], None
    if not settings.flag(f"{_CLASS}.TRAIN", True):
        used, reason = "none", f"{_CLASS}.TRAIN is off"
    elif len(set(methods)) > 1 or len(set(parameters.get(used, [0.0]))) > 1:
        used, reason = "none", "the levels differ, and hiertune has one loss.class_weights for all"
    settings.carry(f"{_CLASS}.TRAIN", "loss.class_weights.method")
    if reason is None:
        settings.carry(f"{_CLASS}.METHOD", "loss.class_weights.method")
    else:
        settings.drop(f"{_CLASS}.METHOD", reason)
    for method, (name, ours, _) in _METHOD_KEYS.items():
        if method == used:
            settings.carry(f"{_CLASS}.{name}", f"loss.class_weights.{ours}")
        else:
            settings.drop(f"{_CLASS}.{name}", reason or f"the method '{used}' has none")
    if used == "none":
        return {"method": "none"}
    context.differs.append(
        "class weights are applied once, and average one over the training rows; Linnaeus applies them four"
        " times"
    )
    return {"method": used, _METHOD_KEYS[used][1]: parameters[used][0]}
