"""Optimisers, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hiertune.config import AdamWConfig, OptimizerConfig, ScheduleConfig
from hiertune.models import HierarchicalClassifier
from hiertune.models.timm_backbone import TimmBackbone


def parameter_groups(model: HierarchicalClassifier, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The parameters that are trained, in groups that differ in `lr_scale`, a share of the learning rate.

    With `layer_decay` d < 1 every parameter of a timm backbone has the share that timm gives it in a model
    with a classifier: d**n in the n-th layer before it (Clark et al., ELECTRA, 2020; Bao et al., BEiT, 2022).
    All that follows the backbone has 1, and is the last group.
    """
    groups: list[dict[str, Any]] = []
    if config.layer_decay < 1 and isinstance(model.backbone, TimmBackbone):
        groups = _layer_groups(model.backbone, config)
    grouped = {parameter for group in groups for parameter in group["params"]}
    rest = [p for p in model.parameters() if p.requires_grad and p not in grouped]
    return [*groups, {"params": rest, "lr_scale": 1.0}]


def _layer_groups(backbone: TimmBackbone, config: OptimizerConfig) -> list[dict[str, Any]]:
    from timm.optim import param_groups_layer_decay

    def scales(model: nn.Module) -> dict[nn.Parameter, float]:
        groups = param_groups_layer_decay(
            model, weight_decay_exclude_1d=False, layer_decay=config.layer_decay
        )
        return {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}

    # with its classifier, for timm counts layers from there; some models have other parameters in that layer
    with torch.random.fork_rng(devices=[]):
        whole = backbone.with_classifier()
    of_whole = scales(whole)
    scale_of_name = {name: of_whole[p] for name, p in whole.named_parameters() if p in of_whole}
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in backbone.body.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(scale_of_name[name], []).append(parameter)
    return [{"params": groups[scale], "lr_scale": scale} for scale in sorted(groups)]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def build_optimizer(
    config: OptimizerConfig, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]]
) -> torch.optim.Optimizer:
    """AdamW or SGD in torch's fused form: one kernel over all parameters, on CPU several times faster."""
    if isinstance(config, AdamWConfig):
        return torch.optim.AdamW(
            parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
    return torch.optim.SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate_factor(config: ScheduleConfig, step: int, total: int) -> float:
    """Share of the peak learning rate in `step` (from 0) of `total`.

    Rises linearly over the first `round(warmup * total)` steps, the last of which has the peak; then
    stays, or falls along half a cosine so that the very last step has `final`. Without warm-up the
    first step has the peak.
    """
    peak = max(round(config.warmup * total), 1) - 1
    if step <= peak:
        return (step + 1) / (peak + 1)
    if config.kind == "constant":
        return 1.0
    progress = (step - peak) / (total - 1 - peak)
    return config.final + (1.0 - config.final) * (1.0 + math.cos(math.pi * progress)) / 2.0
