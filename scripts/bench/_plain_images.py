"""What a hand-written timm script does with the same images and settings: one loop, one loss per level."""

from __future__ import annotations

import math

import timm
import torch
import torch.nn.functional as F
from torch import nn

from hiertune.config import TrialConfig
from hiertune.data import HierarchicalDataset


class PlainClassifier(nn.Module):
    def __init__(self, name: str, size: int, classes: tuple[int, ...]) -> None:
        super().__init__()
        self.body = timm.create_model(name, num_classes=0)
        width = getattr(self.body, "head_hidden_size", None) or self.body.num_features
        self.heads = nn.ModuleList(nn.Linear(width, count) for count in classes)
        settings = timm.data.resolve_model_data_config(self.body)
        self.size, self.mean, self.std = size, *(torch.tensor(settings[key]) for key in ("mean", "std"))

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        x = ((images / 255 - self.mean) / self.std).permute(0, 3, 1, 2)
        if x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        features = self.body(x)
        return [head(features) for head in self.heads]


def train_plain(config: TrialConfig, data: HierarchicalDataset) -> float:
    """Train like `config` (timm, AdamW, cosine with warm-up); accuracy of the finest level on validation."""
    train, backbone = config.train, config.model.backbone
    torch.manual_seed(train.seed)
    model = PlainClassifier(backbone.name, backbone.image_size, data.taxonomy.num_classes)
    model.body.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay, fused=True
    )
    images, labels = data.inputs.rows(data.rows("train", "val", "test")), torch.tensor(data.labels)
    rows = torch.from_numpy(data.rows("train"))
    total = train.epochs * math.ceil(len(rows) / train.batch_size)
    warm = max(round(config.schedule.warmup * total), 1)
    step = 0
    for _ in range(train.epochs):
        model.train()
        for batch in rows[torch.randperm(len(rows))].split(train.batch_size):
            fall = (1 + math.cos(math.pi * max(step + 1 - warm, 0) / (total - warm))) / 2
            factor = (config.schedule.final + (1 - config.schedule.final) * fall) * min((step + 1) / warm, 1)
            optimizer.param_groups[0]["lr"] = config.optimizer.lr * factor
            logits = model(images[batch])
            sum(F.cross_entropy(z, y) for z, y in zip(logits, labels[batch].T, strict=True)).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        accuracy = _accuracy(model, images, labels, torch.from_numpy(data.rows("val")))
    return accuracy


@torch.no_grad()
def _accuracy(
    model: PlainClassifier, images: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor
) -> float:
    model.eval()
    answers = torch.cat([model(images[batch])[-1].argmax(1) for batch in rows.split(256)])
    return (answers == labels[rows, -1]).double().mean().item()
