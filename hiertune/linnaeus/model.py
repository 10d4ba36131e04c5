"""`MODEL` and `AUG` as the section `model`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hiertune.linnaeus.context import Context

DEFAULT_BACKBONE = "resnet50"
"""The timm model that stands in for Linnaeus' own."""


def model_section(context: Context) -> dict[str, Any]:
    return {"backbone": _backbone(context), "head": _head(context)}


def _backbone(context: Context) -> dict[str, Any]:
    settings = context.settings
    dropout = settings.number("MODEL.DROP_RATE", 0.0)
    settings.carry("MODEL.DROP_RATE", "model.backbone.dropout")
    if not context.images:
        context.checks.append("model.backbone: an mlp, because the rows of the data are features")
        settings.drop_rest("AUG", "the rows of the data are no images")
        for key in ("MODEL.DROP_PATH_RATE", "MODEL.IMG_SIZE", "DATA.IMG_SIZE"):
            settings.drop_rest(key, "the rows of the data are no images")
        return {"kind": "mlp", "dropout": dropout}
    context.checks.append(
        f"model.backbone.name: {DEFAULT_BACKBONE} stands in for Linnaeus' model: "
        "choose one of timm.list_models(), and pretrained or weights"
    )
    backbone: dict[str, Any] = {"kind": "timm", "name": DEFAULT_BACKBONE, "dropout": dropout}
    if settings.given("MODEL.DROP_PATH_RATE"):
        backbone["drop_path"] = settings.number("MODEL.DROP_PATH_RATE", 0.0)
    settings.carry("MODEL.DROP_PATH_RATE", "model.backbone.drop_path")
    sizes = [key for key in ("DATA.IMG_SIZE", "MODEL.IMG_SIZE") if settings.given(key)]
    for key in sizes:
        size = settings.whole(key, 0)
        if backbone.setdefault("image_size", size) == size:
            settings.carry(key, "model.backbone.image_size")
        else:
            settings.drop(key, f"{sizes[0]} says it")
    return {**backbone, "augment": _augment(context)}


def _augment(context: Context) -> dict[str, Any]:
    settings = context.settings
    policy, jitter, erasing = "AUG.AUTOAUG.POLICY", "AUG.AUTOAUG.COLOR_JITTER", "AUG.RANDOM_ERASE.PROB"
    written = settings.choice(
        policy, "original", ("original", "originalr", "v0", "v0r", "3a", "hybrid_v0", "none", "")
    )
    if settings.has(policy) and not settings.given(policy):
        written = "none"
    known = {"original": "auto_augment", "originalr": "auto_augment", "none": "none", "": "none"}
    if written in known:
        settings.carry(policy, "model.backbone.augment.policy")
    else:
        settings.drop(policy, f"torchvision has no policy '{written}': auto_augment is used")
    if known.get(written) != "none":
        context.differs.append("AutoAugment is torchvision's, with the policy that was found on ImageNet")
    settings.carry(jitter, "model.backbone.augment.color_jitter")
    settings.carry(erasing, "model.backbone.augment.erasing")
    return {
        "policy": known.get(written, "auto_augment"),
        "color_jitter": settings.number(jitter, 0.4),
        "erasing": settings.number(erasing, 0.25),
    }


# ---------------------------------------------------------------------------------------- head

_HEADS = "MODEL.CLASSIFICATION.HEADS"
_KINDS = {
    "Linear": "linear",
    "Conv1d": "linear",
    "HierarchicalSoftmax": "hierarchical_softmax",
    "ConditionalClassifier": "conditional",
}


def _head(context: Context) -> dict[str, Any]:
    settings = context.settings
    heads = {context.levels[task]: _level_head(context, task) for task in context.tasks[::-1]}
    settings.drop_rest(_HEADS, "the experiment has no such level in DATA.TASK_KEYS_H5")
    if any(head["kind"] in ("hierarchical_softmax", "conditional") for head in heads.values()):
        context.differs.append(
            "the heads refine each level by the one above it; in Linnaeus they miss the parents (order of the"
            " levels) and stay linear"
        )
    counted = Counter(tuple(head.items()) for head in heads.values())
    default = dict(counted.most_common(1)[0][0])
    others = {level: head for level, head in heads.items() if head != default}
    if not others:
        return default
    context.differs.append(
        "each level is refined once, by its own head; in Linnaeus each head refines all levels"
    )
    return {"kind": "mixed", "default": default, "levels": others}


def _level_head(context: Context, task: str) -> dict[str, Any]:
    settings, level = context.settings, context.levels[task]
    kind_key, routing, temperature, bias = (
        f"{_HEADS}.{task}.{name}" for name in ("TYPE", "ROUTING_STRATEGY", "TEMPERATURE", "USE_BIAS")
    )
    written = settings.choice(kind_key, "Linear", _KINDS)
    head: dict[str, Any] = {"kind": _KINDS[written], "bias": settings.flag(bias, True)}
    for key in (kind_key, bias):
        settings.carry(key, f"model.head.levels.{level}")
    for key in (routing, temperature):
        if head["kind"] == "conditional":
            settings.carry(key, f"model.head.levels.{level}")
        else:
            settings.drop(key, f"a {written} head has none")
    if head["kind"] == "conditional":
        head["routing"] = settings.choice(routing, "soft", ("soft", "hard", "gumbel"))
        head["temperature"] = settings.number(temperature, 1.0)
        if head["temperature"] <= 0:
            raise settings.refuse(temperature, f"{head['temperature']} is out of range", "a number above 0")
    return head
