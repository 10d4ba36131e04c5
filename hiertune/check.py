"""The rules of a space or a config that need the data, or several sections, to be decided."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hiertune._problems import Problems, nearest, origin_of
from hiertune._yaml import Key
from hiertune.config import (
    ASHAConfig,
    AugmentConfig,
    BackboneConfig,
    FixedConfig,
    GradNormConfig,
    IdentityConfig,
    MedianConfig,
    MixedHeadConfig,
    MixupConfig,
    MLPConfig,
    NoMixConfig,
    TaxonomySmoothingConfig,
    TimmConfig,
    TrialConfig,
    UnknownOutcomeConfig,
)
from hiertune.errors import InputError
from hiertune.space import Resolved, Space, located

if TYPE_CHECKING:
    from hiertune.data import HierarchicalDataset


@dataclass(frozen=True)
class _Metric:
    per_level: Literal["never", "optional", "always"]
    mode: Literal["max", "min"]


_METRICS = {
    "loss": _Metric("optional", "min"),
    "accuracy": _Metric("always", "max"),
    "top5_accuracy": _Metric("always", "max"),
    "accuracy_seen": _Metric("always", "max"),
    "chain_accuracy": _Metric("never", "max"),
    "partial_chain_accuracy": _Metric("never", "max"),
    "hierarchical_distance": _Metric("never", "min"),
    "average_distance": _Metric("never", "min"),
}
"""The metrics of a validation split that a search can optimise."""


def objective_metrics(levels: tuple[str, ...]) -> list[str]:
    """The name of every metric that a search over these levels can optimise."""
    bare = [f"val/{name}" for name, metric in _METRICS.items() if metric.per_level != "always"]
    leveled = [name for name, metric in _METRICS.items() if metric.per_level != "never"]
    return bare + [f"val/{name}/{level}" for name in leveled for level in levels]


def check_with_data(target: Space | TrialConfig, dataset: HierarchicalDataset) -> None:
    """Raise InputError for what cannot be trained or measured on this data set.

    Of a space, every config that `Space.corners` lists is checked, and its `search` section. The
    sections of a trial are chosen independently, so what two sections forbid together is an error
    as soon as each can occur.
    """
    if isinstance(target, Space):
        corners = list(target.corners())
        problems = Problems(target.file)
        gpu = _workers_may_have_gpu(target.config.search.gpus_per_worker)
        dataset.require_rows("train", "val")
        _check_objective(target, dataset.levels, problems)
        _check_grace(target, corners, problems)
    else:
        corners = [Resolved(target, {})]
        problems = Problems(None)
        gpu = _cuda_is_available()
        dataset.require_rows("train")
    _check_level_names(corners, dataset.levels, problems)
    _check_batch_size(corners, len(dataset.rows("train")), problems)
    _check_shared_layer(corners, problems)
    _check_mix(corners, dataset, problems)
    _check_gradnorm_interval(corners, problems)
    _check_layer_decay(corners, problems)
    folder = target.folder if isinstance(target, Space) else Path()
    _check_images(corners, folder, dataset.inputs.shape[1:], problems)
    _check_device(corners, gpu, problems)
    problems.raise_any()


def _workers_may_have_gpu(asked: float | None) -> bool:
    if asked is not None:
        return asked > 0
    # A cluster elsewhere may have the GPUs that this machine lacks.
    return bool(os.environ.get("RAY_ADDRESS")) or _cuda_is_available()


def _cuda_is_available() -> bool:
    import torch  # takes seconds to import

    return torch.cuda.is_available()


def _add(problems: Problems, at: Resolved, key: Key, problem: str, allowed: str) -> None:
    origin = origin_of(at.origins, key)
    problems.add(problem, line=origin.line if origin else None, key=key, allowed=allowed)


def _first(corners: Iterable[Resolved], test: Callable[[TrialConfig], bool]) -> Resolved | None:
    return next((corner for corner in corners if test(corner.config)), None)


# ---------------------------------------------------------------------------- the search section


def _check_objective(space: Space, levels: tuple[str, ...], problems: Problems) -> None:
    objective = space.config.search.objective
    written = objective.metric or f"val/accuracy/{levels[-1]}"
    problem, allowed = _metric_problem(written, levels)
    key = "metric"
    if problem is None:
        best = _METRICS[written.split("/")[1]].mode
        if objective.mode == best:
            return
        key, allowed = "mode", best
        problem = f"'{objective.mode}' would look for the worst {written}"
    line = space.line_of(f"search.objective.{key}")
    problems.add(problem, line=line, key=("search", "objective", key), allowed=allowed)


def _metric_problem(metric: str, levels: tuple[str, ...]) -> tuple[str | None, str]:
    """What is wrong with the name of a metric (None if nothing is), and what is allowed."""
    split, _, rest = metric.partition("/")
    name, _, level = rest.partition("/")
    if split != "val" or name not in _METRICS or metric.endswith("/"):
        known = ", ".join(f"val/{known}{_level_form(known)}" for known in _METRICS)
        return f"there is no metric '{metric}'{nearest(metric, objective_metrics(levels))}", known
    form = _METRICS[name].per_level
    if form == "never" and level:
        return f"'val/{name}' has no levels, got '{metric}'", f"val/{name}"
    if form == "always" and not level:
        return f"'{metric}' needs a level, as in 'val/{name}/{levels[-1]}'", ", ".join(levels)
    if level and level not in levels:
        return f"the data has no level '{level}'{nearest(level, levels)}", ", ".join(levels)
    return None, ""


def _level_form(name: str) -> str:
    return {"never": "", "optional": "[/<level>]", "always": "/<level>"}[_METRICS[name].per_level]


def _check_grace(space: Space, corners: list[Resolved], problems: Problems) -> None:
    scheduler = space.config.search.scheduler
    if not isinstance(scheduler, ASHAConfig | MedianConfig):
        return
    if "grace_epochs" not in scheduler.model_fields_set:
        return  # the default gives way to short trials
    epochs = min(corner.config.train.epochs for corner in corners)
    if scheduler.grace_epochs > epochs:
        problems.add(
            f"{scheduler.grace_epochs} is more than a trial's epochs ({epochs}): none would ever be stopped",
            line=space.line_of("search.scheduler.grace_epochs"),
            key=("search", "scheduler", "grace_epochs"),
            allowed=f"a whole number of at least 1 and at most {epochs}",
        )


# ------------------------------------------------------------------------------ the trial's sections


def _level_names(config: TrialConfig) -> Iterator[tuple[Key, str]]:
    """Every level that a config names, each with the key at which it does."""
    head, loss, weighting = config.model.head, config.loss, config.weighting
    mix, unknown = config.mix, config.unknown
    if isinstance(head, MixedHeadConfig):
        yield from ((("model", "head", "levels", level), level) for level in head.levels)
    if isinstance(loss, TaxonomySmoothingConfig):
        yield from ((("loss", "levels", level), level) for level in loss.levels)
    if isinstance(weighting, FixedConfig):
        yield from ((("weighting", "weights", level), level) for level in weighting.weights)
    if not isinstance(mix, NoMixConfig) and mix.level is not None:
        yield ("mix", "level"), mix.level
    if isinstance(unknown, UnknownOutcomeConfig):
        yield from ((("unknown", "levels", i), level) for i, level in enumerate(unknown.levels or ()))


def _check_level_names(corners: list[Resolved], levels: tuple[str, ...], problems: Problems) -> None:
    for corner in corners:
        for key, level in _level_names(corner.config):
            if level not in levels:
                problem = f"the data has no level '{level}'{nearest(level, levels)}"
                _add(problems, corner, key, problem, ", ".join(levels))


def _check_batch_size(corners: list[Resolved], rows: int, problems: Problems) -> None:
    key = ("train", "batch_size")
    most = max(corners, key=lambda corner: corner.config.train.batch_size)
    if (size := most.config.train.batch_size) > rows:
        problem = f"a batch of {size} rows is larger than the training split of {rows}"
        _add(problems, most, key, problem, f"a whole number of at least 1 and at most {rows}")
    normed = _first(corners, _has_batch_norm)
    least = min(corners, key=lambda corner: corner.config.train.batch_size)
    if normed and least.config.train.batch_size == 1:
        problem = "a batch of one row has no batch statistics, which the mlp backbone's 'norm: batch' needs"
        _add(problems, least, key, problem, "a whole number of at least 2; or another norm")


def _has_batch_norm(config: TrialConfig) -> bool:
    return isinstance(config.model.backbone, MLPConfig) and config.model.backbone.norm == "batch"


def _check_shared_layer(corners: list[Resolved], problems: Problems) -> None:
    bare = _first(corners, lambda config: _without_layers(config.model.backbone) is not None)
    for place in ("last_layer", "backbone"):
        weighed = _first(corners, functools.partial(_measures, place))
        if bare and weighed:
            what = _without_layers(bare.config.model.backbone)
            problem = f"'{place}' needs a shared layer, and {what} has none"
            _add(problems, weighed, ("weighting", "at"), problem, "features; or another backbone")


def _without_layers(backbone: BackboneConfig) -> str | None:
    """What to call a backbone that has no layers to train; None for others."""
    if isinstance(backbone, IdentityConfig):
        return "the identity backbone"
    frozen = isinstance(backbone, TimmConfig) and backbone.frozen and not backbone.hidden
    return "a frozen backbone without hidden layers" if frozen else None


def _measures(place: str, config: TrialConfig) -> bool:
    return isinstance(config.weighting, GradNormConfig) and config.weighting.at == place


def _check_gradnorm_interval(corners: list[Resolved], problems: Problems) -> None:
    balanced = [corner for corner in corners if isinstance(corner.config.weighting, GradNormConfig)]
    most = max(corner.config.train.accumulation for corner in corners)
    least = min(balanced, key=_interval, default=None)
    if least and (interval := _interval(least)) < most:
        problem = (
            f"{interval} is below train.accumulation ({most}): Linnaeus counts it in forward passes, "
            "of which no optimiser step may hold two updates"
        )
        allowed = f"a whole number of at least {most}; or a smaller train.accumulation"
        _add(problems, least, ("weighting", "interval"), problem, allowed)


def _interval(corner: Resolved) -> int:
    assert isinstance(corner.config.weighting, GradNormConfig)
    return corner.config.weighting.interval


def _check_mix(corners: list[Resolved], dataset: HierarchicalDataset, problems: Problems) -> None:
    for corner in corners:
        mix = corner.config.mix
        if not isinstance(mix, NoMixConfig | MixupConfig) and len(dataset.inputs.shape) != 4:
            problem = f"'{mix.kind}' cuts rectangles out of images, and the data has features"
            _add(problems, corner, ("mix", "kind"), problem, "none, mixup")


def warnings_with_data(target: Space | TrialConfig, dataset: HierarchicalDataset) -> list[str]:
    """What can be trained, but is seldom meant: one sentence each, with the line where there is one."""
    corners = list(target.corners()) if isinstance(target, Space) else [Resolved(target, {})]
    unknown = bool((dataset.labels < 0).any())
    found = {
        _placed(corner, key, text): None
        for corner in corners
        for key, text in _warnings(corner.config, dataset.levels[-1], unknown)
    }
    return list(found)


def _warnings(config: TrialConfig, finest: str, unknown: bool) -> Iterator[tuple[Key, str]]:
    """Of one config, by key; `unknown` says whether the data have unknown labels."""
    mix, backbone = config.mix, config.model.backbone
    if not isinstance(mix, NoMixConfig):
        if mix.level not in (None, finest):
            text = f"rows of one {mix.level} but of different {finest} are mixed: their targets are mixtures"
            yield ("mix", "level"), f"{text}; {finest} keeps them certain"
        if not mix.exclude_unknown and unknown:
            text = "rows with unknown labels are mixed: their targets are known in part; true leaves them out"
            yield ("mix", "exclude_unknown"), text
    if isinstance(backbone, TimmConfig) and backbone.frozen and not (backbone.pretrained or backbone.weights):
        text = "a frozen backbone with neither pretrained weights nor a weights file makes random features"
        yield ("model", "backbone", "frozen"), text


def _placed(at: Resolved, key: Key, text: str) -> str:
    origin = origin_of(at.origins, key)
    return f"{'.'.join(map(str, key))}{f' (line {origin.line})' if origin else ''}: {text}"


def _check_layer_decay(corners: list[Resolved], problems: Problems) -> None:
    other = _first(corners, lambda config: not _is_trained_timm(config.model.backbone))
    decayed = _first(corners, lambda config: config.optimizer.layer_decay < 1)
    if other and decayed:
        kind = (
            "frozen"
            if isinstance(other.config.model.backbone, TimmConfig)
            else other.config.model.backbone.kind
        )
        problem = f"{decayed.config.optimizer.layer_decay} is for timm backbones, and this one can be {kind}"
        _add(
            problems,
            decayed,
            ("optimizer", "layer_decay"),
            problem,
            "1; or only timm backbones that are trained",
        )


def _is_trained_timm(backbone: BackboneConfig) -> bool:
    return isinstance(backbone, TimmConfig) and not backbone.frozen


def _check_images(corners: list[Resolved], folder: Path, shape: tuple[int, ...], problems: Problems) -> None:
    """Every timm backbone is built once, with its weights: they may not be had, or not fit."""
    checked = set()
    least = min(corners, key=lambda corner: corner.config.train.batch_size)
    for corner in corners:
        backbone = located(corner.config, folder).model.backbone
        if not isinstance(backbone, TimmConfig):
            continue
        _check_augmentation(corner, backbone.augment, shape, problems)
        built = TimmConfig(
            name=backbone.name,
            pretrained=backbone.pretrained,
            weights=backbone.weights,
            image_size=backbone.image_size,
            drop_path=0.1 if backbone.drop_path > 0 else 0.0,
            frozen=backbone.frozen,
        ).model_dump_json()
        if built in checked:
            continue
        checked.add(built)
        try:
            normed = _uses_batch_statistics(TimmConfig.model_validate_json(built), shape)
        except InputError as error:
            problem = f"{error.file}: {error.problem}" if error.file else error.problem
            key = tuple((error.key or "model.backbone").split("."))
            _add(problems, corner, key, problem, error.allowed or "")
            continue
        if normed and least.config.train.batch_size == 1:
            problem = f"a batch of one row has no batch statistics, which {backbone.name} needs"
            allowed = "a whole number of at least 2; or another backbone, or a frozen one"
            _add(problems, least, ("train", "batch_size"), problem, allowed)


def _uses_batch_statistics(backbone: TimmConfig, shape: tuple[int, ...]) -> bool:
    """Whether its training does. Raises InputError for what cannot be built."""
    import torch

    from hiertune.models.timm_backbone import TimmBackbone
    from hiertune.train.batch_norm import uses_batch_statistics

    with torch.random.fork_rng(devices=[]):
        built = TimmBackbone(shape, backbone)
    built.check_images()
    return uses_batch_statistics(built)


def _check_augmentation(
    corner: Resolved, augment: AugmentConfig, shape: tuple[int, ...], problems: Problems
) -> None:
    if len(shape) != 3 or shape[2] in (1, 3):
        return
    section = ("model", "backbone", "augment")
    allowed = "images of 1 or 3 channels; crop_scale, flip and erasing take any"
    if augment.policy != "none":
        problem = f"'{augment.policy}' knows no images of {shape[2]} channels"
        _add(problems, corner, (*section, "policy"), problem, allowed)
    if augment.color_jitter > 0:
        problem = f"{augment.color_jitter} is for colours, and these images have {shape[2]} channels"
        _add(problems, corner, (*section, "color_jitter"), problem, allowed)


def _check_device(corners: list[Resolved], gpu: bool, problems: Problems) -> None:
    for corner in corners:
        train = corner.config.train
        if train.device == "cuda" and not gpu:
            problem = "'cuda' needs a GPU, and the workers have none"
            _add(problems, corner, ("train", "device"), problem, "auto, cpu")
        elif train.precision == "fp16" and (train.device == "cpu" or not gpu):
            where = "train.device is 'cpu'" if train.device == "cpu" else "the workers have none"
            problem = f"'fp16' needs a GPU, and {where}"
            _add(problems, corner, ("train", "precision"), problem, "fp32, bf16")
