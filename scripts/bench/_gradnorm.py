"""GradNorm: a training step with an update of the weights against the same step without one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from _bench import Figure, ratio
from _losses import random_tree
from torch import Tensor, nn

from hiertune.config import (
    GradNormConfig,
    HierarchicalSoftmaxConfig,
    MLPConfig,
    ModelConfig,
    TaxonomySmoothingConfig,
)
from hiertune.losses import build_losses, level_losses
from hiertune.models import HierarchicalClassifier, HierarchicalHead, build_model
from hiertune.weighting import Equal, GradNorm, Weighting

SIZES = (2, 30, 60, 130, 280, 1239)
INPUTS = 2080
INTERVAL = GradNormConfig().interval
TAXONOMY = random_tree(SIZES)


def run(quick: bool) -> list[Figure]:
    """One thread is assumed, six levels, a head that refines, AdamW; about 3 minutes, 30 s when `quick`."""
    rounds = 7 if quick else 21
    figures = []
    for batch in (64,) if quick else (64, 256):
        inputs = torch.randn(batch, INPUTS)
        for at, target in (("features", 1.25), ("last_layer", 1.6)):
            value = _update_ratio(_mlp(), inputs, at, rounds)
            name = f"gradnorm/{at}/mlp/batch{batch}"
            amortised = 1 + (value - 1) / INTERVAL
            figures += [Figure(name, value, target), Figure(f"{name}/every_{INTERVAL}_steps", amortised)]
    batch = 16 if quick else 32
    value = _update_ratio(_resnet(), torch.randn(batch, 3, 64, 64), "features", 9 if quick else 25)
    return [*figures, Figure(f"gradnorm/features/resnet18/batch{batch}", value, 1.05)]


def _update_ratio(model: HierarchicalClassifier, inputs: Tensor, at: str, rounds: int) -> float:
    gradnorm = GradNorm(GradNormConfig(at=at, interval=1), TAXONOMY.levels)
    plain = Equal(TAXONOMY.levels)
    labels = torch.tensor(TAXONOMY.ancestors(-1))[torch.randint(SIZES[-1], (len(inputs),))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return ratio(
        _step(model, inputs, labels, gradnorm, optimizer),
        _step(model, inputs, labels, plain, optimizer),
        rounds=rounds,
        round_seconds=0.1,
    )


def _step(
    model: HierarchicalClassifier,
    inputs: Tensor,
    labels: Tensor,
    weighting: Weighting,
    optimizer: torch.optim.Optimizer,
) -> Callable[[], None]:
    losses = build_losses(TaxonomySmoothingConfig(), TAXONOMY)
    known_counts = (labels >= 0).sum(0).float()

    def reduced(logits: dict[str, Tensor]) -> list[Tensor]:
        return level_losses(losses, logits, labels, known_counts, [None] * len(SIZES))

    def run_once() -> None:
        optimizer.zero_grad()
        of_level = reduced(model(inputs))
        if weighting.wants_update(0):
            weighting.update(model, of_level, known_counts, lambda: reduced(model.base_logits))
        (torch.stack(of_level) * weighting.weights).sum().backward()
        optimizer.step()

    return run_once


def _mlp() -> HierarchicalClassifier:
    torch.manual_seed(0)
    config = ModelConfig(backbone=MLPConfig(hidden=[1024, 512]), head=HierarchicalSoftmaxConfig())
    return build_model(config, TAXONOMY, (INPUTS,), None)


def _resnet() -> HierarchicalClassifier:
    torch.manual_seed(0)
    return HierarchicalClassifier(ResNet18(), HierarchicalHead(512, TAXONOMY, "hierarchical_softmax"))


class ResNet18(nn.Module):
    """The 18-layer residual network (He et al. 2015), pooled to `[B, 512]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        blocks: list[nn.Module] = []
        channels = 64
        for width in (64, 128, 256, 512):
            blocks += [_Block(channels, width, 1 if width == 64 else 2), _Block(width, width, 1)]
            channels = width
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x)).mean((2, 3))


class _Block(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)
        same = stride == 1 and channels == width
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(y)) + self.shortcut(x))
