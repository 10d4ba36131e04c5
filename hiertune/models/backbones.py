"""What turns inputs into the features that all levels share.

A backbone is a module with `out_features: int` and `last_shared_weight: nn.Parameter | None`, the weight
of its last layer with one. Shapes: B batch, D input features (images are flattened to H*W*C).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hiertune.config import IdentityConfig, MLPConfig

Standardization = tuple[Tensor, Tensor]
"""Mean and standard deviation `[D]` of every input over the training rows, in the units of the data."""

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
_NORMS: dict[str, Callable[[int], nn.Module]] = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d}


class Standardize(nn.Module):
    """(x - mean) / std on `[B, D]`; inputs that never vary (std 0) are only shifted.

    Without statistics it changes nothing until a state dict brings them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, in_features: int, statistics: Standardization | None) -> None:
        super().__init__()
        mean, std = statistics or (torch.zeros(in_features), torch.ones(in_features))
        std = torch.as_tensor(std, dtype=torch.get_default_dtype())
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.get_default_dtype()).clone())
        self.register_buffer("std", torch.where(std == 0, 1.0, std))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Identity(nn.Module):
    """The inputs themselves as features, standardised and dropped out if asked. No parameters."""

    last_shared_weight = None

    def __init__(
        self, in_features: int, config: IdentityConfig, standardization: Standardization | None = None
    ) -> None:
        super().__init__()
        self.out_features = in_features
        self.inputs = _input_layers(in_features, config.standardize, standardization, config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Features `[B, D]`; integer inputs (images) become floats in their own units."""
        return self.inputs(_flat(x))


class Scale(nn.Module):
    """Gives every row of `[B, D]` the Euclidean length `length` (Wang et al., NormFace, 2017).

    Bounds the logits, so that classes with few rows are not drowned by those with many.
    """

    def __init__(self, length: float) -> None:
        super().__init__()
        self.length = length

    def forward(self, x: Tensor) -> Tensor:
        return self.length * nn.functional.normalize(x, dim=1)


class MLP(nn.Module):
    """Linear, normalisation, activation, dropout; once per width in `config.hidden`.

    With `config.feature_length` the last features are scaled to that length.

    `norm: batch` is `nn.BatchNorm1d`: by itself it normalises by the rows of its own process, of which
    training needs at least two. Where several workers train, the loop puts a version in its place that
    normalises by the rows of all of them, on CPU too (`nn.SyncBatchNorm` works on GPUs only).
    """

    def __init__(
        self, in_features: int, config: MLPConfig, standardization: Standardization | None = None
    ) -> None:
        super().__init__()
        self.out_features = config.hidden[-1]
        self.inputs = _input_layers(in_features, config.standardize, standardization, config.input_dropout)
        layers: list[nn.Module] = []
        for width in config.hidden:
            layers.append(nn.Linear(in_features, width))
            if config.norm != "none":
                layers.append(_NORMS[config.norm](width))
            layers.append(_ACTIVATIONS[config.activation]())
            layers.append(nn.Dropout(config.dropout))
            in_features = width
        if config.feature_length > 0:
            layers.append(Scale(config.feature_length))
        self.layers = nn.Sequential(*layers)

    @property
    def last_shared_weight(self) -> nn.Parameter:
        linears = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        return linears[-1].weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """Features `[B, hidden[-1]]`; integer inputs (images) become floats in their own units."""
        return self.layers(self.inputs(_flat(x)))


def _flat(x: Tensor) -> Tensor:
    x = x.flatten(1)
    return x if x.is_floating_point() else x.to(torch.get_default_dtype())


def _input_layers(
    in_features: int, standardize: bool, statistics: Standardization | None, dropout: float
) -> nn.Sequential:
    layers: list[nn.Module] = [Standardize(in_features, statistics)] if standardize else []
    return nn.Sequential(*layers, nn.Dropout(dropout))
