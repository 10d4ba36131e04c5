"""The parts of a trial, made from its config.

Shapes: N rows of the data set, H, W, C height, width and channels of an image.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hiertune.config import (
    AugmentConfig,
    NoMixConfig,
    TimmConfig,
    TrainConfig,
    TrialConfig,
    UnknownOutcomeConfig,
)
from hiertune.data import HierarchicalDataset, Inputs
from hiertune.errors import InputError
from hiertune.models import HierarchicalClassifier, build_model
from hiertune.models.timm_backbone import TimmBackbone, image_size
from hiertune.taxonomy import Taxonomy
from hiertune.train.augment import Augmentation
from hiertune.train.batch_norm import synchronize_batch_norms, uses_batch_statistics
from hiertune.train.batches import BatchPlan
from hiertune.train.features import fixed_features, uses_fixed_features
from hiertune.train.mixing import Mixing
from hiertune.train.standardize import standardization
from hiertune.train.unknown import UnknownLabels
from hiertune.train.workers import Workers


def plan_of(
    config: TrialConfig,
    data: HierarchicalDataset,
    inputs: Inputs,
    rows: np.ndarray,
    augmentation: Augmentation | None,
) -> BatchPlan:
    """The order of `rows` in every epoch, and what is mixed or hidden. The model is fed with `inputs`."""
    train, mixing, unknown = config.train, None, None
    if not isinstance(config.mix, NoMixConfig):
        shape = tuple(inputs.shape[1:])
        if augmentation is not None:  # rows are mixed after it
            shape = (*augmentation.output_size(*shape[:2]), *shape[2:])
        mixing = Mixing(config.mix, data.taxonomy, data.labels, rows, shape)
    if isinstance(config.unknown, UnknownOutcomeConfig):
        unknown = UnknownLabels(config.unknown, data)
    return BatchPlan(
        inputs, rows, train.batch_size, train.seed, train.accumulation, train.epochs, mixing, unknown
    )


def model_of(
    config: TrialConfig, data: HierarchicalDataset, taxonomy: Taxonomy, fit_on: tuple[str, ...]
) -> HierarchicalClassifier:
    """The model with its initial weights, which follow from torch's random state."""
    wanted = getattr(config.model.backbone, "standardize", False)
    statistics = standardization(data, fit_on) if wanted else None
    return build_model(config.model, taxonomy, tuple(data.inputs.shape[1:]), statistics)


def inputs_of(
    config: TrialConfig, data: HierarchicalDataset, model: HierarchicalClassifier, device: torch.device
) -> Inputs:
    """What the model is fed with: the data's inputs, or what a frozen backbone always makes of them."""
    if not uses_fixed_features(config):
        return data.inputs
    assert isinstance(model.backbone, TimmBackbone)
    context = autocast(config.train, device)
    return fixed_features(data, model.backbone, config.train.precision, device, context)


def augmentation_of(config: TrialConfig) -> Augmentation | None:
    """The changes of training images; None for none."""
    backbone = config.model.backbone
    if not isinstance(backbone, TimmConfig) or backbone.augment == AugmentConfig():
        return None
    return Augmentation(backbone.augment, config.train.seed, image_size(backbone), config.train.threads)


def check_batches(model: HierarchicalClassifier, plan: BatchPlan, workers: Workers) -> None:
    """Raise InputError if some pass has too few rows for the model."""
    if uses_batch_statistics(model) and plan.smallest_pass < 2:
        raise InputError(
            "batch normalisation needs at least two rows in every batch",
            key="train.batch_size",
            allowed="2 or more, or a model.backbone without it",
        )
    backbone = model.backbone
    if (
        plan.smallest_pass < workers.size  # else there is no need to try
        and isinstance(backbone, TimmBackbone)
        and not backbone.takes_no_rows
    ):
        raise InputError(
            f"the smallest batch has {plan.smallest_pass} rows for {workers.size} workers, and this backbone "
            "cannot do without any",
            key="train.batch_size",
            allowed="one that leaves no rest smaller than the number of workers",
        )


def distribute(model: HierarchicalClassifier, workers: Workers, find_unused: bool) -> nn.Module:
    """The model under DDP, its batch norms over all workers; itself, if there is one worker."""
    if workers.size == 1:
        return model
    synchronize_batch_norms(model)
    network = DistributedDataParallel(model, gradient_as_bucket_view=True, find_unused_parameters=find_unused)
    network.broadcast_buffers = False  # they are constant, or synchronised by batch norm itself
    return network


_HALF: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager:
    """The precision of forward passes."""
    if config.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_HALF[config.precision])
