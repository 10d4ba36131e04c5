"""The model of a trial: a backbone and a head, built from the config."""

from __future__ import annotations

import math

from torch import Tensor, nn

from hiertune.config import IdentityConfig, MLPConfig, ModelConfig, TimmConfig
from hiertune.models.backbones import MLP, Identity, Standardization
from hiertune.models.head import HierarchicalHead
from hiertune.models.timm_backbone import TimmBackbone
from hiertune.taxonomy import Taxonomy


class HierarchicalClassifier(nn.Module):
    """Logits of every level from inputs.

    After a forward, `features` `[B, D]` is what entered the head and `base_logits` the head's logits
    before refinement, both with their graph, for GradNorm. They are kept here and not returned,
    because DDP may copy what a forward returns, which would cut them off from the graph.
    `release()` drops them, and with them the graph of that forward.
    """

    def __init__(self, backbone: nn.Module, head: HierarchicalHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.features: Tensor | None = None
        self.base_logits: dict[str, Tensor] | None = None

    @property
    def last_shared_weight(self) -> nn.Parameter | None:
        """Weight of the backbone's last layer that has one; None if it has no parameters."""
        return self.backbone.last_shared_weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits `[B, C_l]` per level, coarse -> fine, from inputs `[B, ...]`."""
        self.features = self.backbone(x)
        self.base_logits = self.head.base(self.features)
        return self.head.refine(self.base_logits)

    def release(self) -> None:
        """Forget the last forward."""
        self.features = self.base_logits = None


def build_model(
    config: ModelConfig,
    taxonomy: Taxonomy,
    input_shape: tuple[int, ...],
    standardization: Standardization | None,
    *,
    load_weights: bool = True,
) -> HierarchicalClassifier:
    """The model of `config`, with fresh weights from torch's current random state.

    `input_shape` is that of one row: `(D,)`, or `(H, W, C)` for images, which all backbones but timm's
    flatten. `standardization` is read only if the backbone standardises; None leaves the inputs as they
    are until a state dict is loaded. `load_weights=False` leaves the weights that the config names
    (`pretrained`, `weights`) alone, for a model whose state dict is loaded next.
    """
    in_features = math.prod(input_shape)
    backbone: MLP | Identity | TimmBackbone
    match config.backbone:
        case MLPConfig():
            backbone = MLP(in_features, config.backbone, standardization)
        case IdentityConfig():
            backbone = Identity(in_features, config.backbone, standardization)
        case TimmConfig():
            backbone = TimmBackbone(input_shape, config.backbone, load_weights=load_weights)
    # the head's settings bear the names of its arguments
    head = HierarchicalHead(backbone.out_features, taxonomy, **config.head.model_dump())
    return HierarchicalClassifier(backbone, head)
