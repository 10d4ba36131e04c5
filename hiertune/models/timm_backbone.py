"""Image backbones of timm (pytorch-image-models), an optional dependency: the extra `vision`.

Shapes: B batch, H, W, C height, width and channels of the data's images, S the model's image size,
P pooled features, D features that enter the head.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hiertune._problems import nearest
from hiertune.config import TimmConfig
from hiertune.errors import InputError
from hiertune.models.backbones import Scale


class TimmBackbone(nn.Module):
    """A model of timm's without its classifier, and optionally further layers.

    Images -> `pixels` (resized, normalised) -> `body` (timm's model) -> pooled features [B, P] ->
    `layers` (dropout, hidden layers, scaling) -> features [B, D].

    A frozen body stays in evaluation mode, so that neither batch statistics nor dropout change it, and
    its parameters take no gradient.
    """

    def __init__(
        self, input_shape: tuple[int, ...], config: TimmConfig, *, load_weights: bool = True
    ) -> None:
        """`input_shape` is that of one row, (H, W, C). `load_weights=False` leaves the fresh weights,
        for a state dict to replace.

        Raises:
            InputError: the rows are no images; timm is not installed, knows no such model, or cannot
                build it so; its weights cannot be had or do not fit.
        """
        super().__init__()
        if len(input_shape) != 3:
            problem = f"timm backbones need images, and a row of this data has the shape {list(input_shape)}"
            allowed = "mlp, identity; or data with inputs [rows, height, width, channels]"
            raise InputError(problem, key="model.backbone.kind", allowed=allowed)
        channels = input_shape[-1]
        self._input_shape, self._config = input_shape, config
        self.name = config.name
        self.frozen = config.frozen
        self.body = _create(channels, config, load_weights)
        self.pixels = _pixels(self.body, channels, config)
        if config.channels_last:
            self.body.to(memory_format=torch.channels_last)
        # where a model has layers between pooling and classifier, this is the width after them
        body: Any = self.body
        width: int = getattr(body, "head_hidden_size", None) or body.num_features
        self.pooled_features = width
        layers: list[nn.Module] = [nn.Dropout(config.dropout)]
        for hidden in config.hidden:
            layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(config.dropout)]
            width = hidden
        if config.feature_length > 0:
            layers.append(Scale(config.feature_length))
        self.layers = nn.Sequential(*layers)
        self.out_features = width
        if self.frozen:
            self.body.requires_grad_(False)
        self.train()

    @property
    def last_shared_weight(self) -> nn.Parameter | None:
        """Weight of the last linear or convolutional layer that is trained; None if there is none."""
        kinds = (nn.Linear, nn.modules.conv._ConvNd)
        trained = [m.weight for m in self.modules() if isinstance(m, kinds) and m.weight.requires_grad]
        return trained[-1] if trained else None  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """Features `[B, D]` from images `[B, H, W, C]` (uint8, or float in the same units) or from
        pooled features `[B, P]`, computed before."""
        return self.layers(self.pooled(x) if x.ndim == 4 else x)

    def pooled(self, images: Tensor) -> Tensor:
        """Pooled features `[B, P]` of images."""
        if len(images) or self._normed:
            return self.body(self.pixels(images))
        # a worker may have no rows, and attention cannot do without: a row that counts for nothing
        return self.body(self.pixels(images.new_zeros(1, *images.shape[1:])))[:0]

    def with_classifier(self) -> nn.Module:
        """timm's model of the same settings with a classifier of one class, and fresh weights."""
        return _create(self._input_shape[-1], self._config, load_weights=False, num_classes=1)

    @property
    def takes_no_rows(self) -> bool:
        """Whether a batch may be empty in training. Attention needs a row, batch norm forbids to add one."""
        return not self._normed or self._failure_on(0) is None

    @property
    def _normed(self) -> bool:
        """Whether batch statistics are used."""
        return any(isinstance(module, _BatchNorm) and module.training for module in self.body.modules())

    def check_images(self) -> None:
        """Raise InputError if the model cannot take images of its size; one forward finds out."""
        if (failure := self._failure_on(1)) is not None:
            raise InputError(
                f"{self.name} cannot take images of {self.pixels.size} x {self.pixels.size} "
                f"({_first_line(failure)})",
                key="model.backbone.image_size",
                allowed="another size; or null, the one that it was made for",
            ) from failure

    @torch.no_grad()
    def _failure_on(self, rows: int) -> Exception | None:
        """What is raised for so many images, in evaluation mode."""
        training = self.training
        images = torch.zeros(rows, *self._input_shape, dtype=torch.uint8, device=self.pixels.mean.device)
        try:
            self.eval().body(self.pixels(images))
        except (AssertionError, RuntimeError, ValueError) as error:
            return error
        finally:
            self.train(training)
        return None

    def train(self, mode: bool = True) -> TimmBackbone:
        super().train(mode)
        if self.frozen:
            self.body.eval()
        return self


class Pixels(nn.Module):
    """Images `[B, H, W, C]` of 0 to 255 -> floats `[B, C, S, S]` as a pretrained model expects them.

    Resized as a whole (bilinear, antialiased; nothing is cropped), then shifted and scaled by channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, size: int, mean: list[float], std: list[float], memory_format: torch.memory_format):
        super().__init__()
        self.size = size
        self.memory_format = memory_format
        self.register_buffer("mean", 255 * torch.tensor(mean)[:, None, None])
        self.register_buffer("std", 255 * torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2).to(self.mean.dtype)
        if x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        return ((x - self.mean) / self.std).contiguous(memory_format=self.memory_format)


def image_size(config: TimmConfig) -> int:
    """Height and width S of the images that the model takes. Raises InputError for an unknown model."""
    _check_name(_timm(), config.name)
    return config.image_size or _default_size(config)


def _pixels(body: nn.Module, channels: int, config: TimmConfig) -> Pixels:
    settings = _timm().data.resolve_model_data_config(body)
    mean, std = (_of_channels(settings[name], channels) for name in ("mean", "std"))
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    return Pixels(config.image_size or _default_size(config), mean, std, memory_format)


def _of_channels(of_rgb: tuple[float, ...], channels: int) -> list[float]:
    """Statistics of each channel: as timm adapts the weights, one channel is the mean of the three, and
    more repeat them."""
    if channels == 1:
        return [sum(of_rgb) / len(of_rgb)]
    return list(itertools.islice(itertools.cycle(of_rgb), channels))


# -------------------------------------------------------------------------------- timm's models


def _timm() -> ModuleType:
    try:
        import timm
        import torchvision  # noqa: F401 - the rest of the extra, needed by timm too
    except ImportError as error:
        raise InputError(
            f"timm backbones need packages that are not installed ({error})",
            key="model.backbone.kind",
            allowed='pip install "hiertune[vision]"',
        ) from None
    return timm


def _check_name(timm: ModuleType, name: str) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        known, what = timm.list_models(), "model"
    elif tag and name not in (known := timm.list_models(f"{architecture}.*", include_tags=True)):
        what = "set of weights"
    else:
        return
    allowed = ", ".join(known) if what != "model" and known else "a name that timm.list_models() lists"
    problem = f"timm has no {what} '{name}'{nearest(name, known)}"
    raise InputError(problem, key="model.backbone.name", allowed=allowed)


def _default_size(config: TimmConfig) -> int:
    return _timm().get_pretrained_cfg(config.name).input_size[-1]


def _create(channels: int, config: TimmConfig, load_weights: bool, num_classes: int = 0) -> nn.Module:
    timm = _timm()
    _check_name(timm, config.name)
    options: dict[str, Any] = {"in_chans": channels, "num_classes": num_classes}
    if config.drop_path > 0:
        options["drop_path_rate"] = config.drop_path
    if config.image_size is not None and timm.get_pretrained_cfg(config.name).fixed_input_size:
        options["img_size"] = config.image_size
    if not load_weights or not (config.pretrained or config.weights):
        return _build(timm, config, options)
    if config.weights is None:
        return _pretrained(timm, config, options)
    return _from_file(timm, config, options, Path(config.weights))


def _build(timm: ModuleType, config: TimmConfig, options: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(config.name, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        key = "model.backbone"
        if "drop_path_rate" in str(error):
            problem = f"{config.name} has no residual branches to drop"
            raise InputError(problem, key=f"{key}.drop_path", allowed="0") from None
        problem = f"timm cannot build {config.name} so ({_first_line(error)})"
        raise InputError(problem, key=key, allowed="another image_size, or another model") from error


def _pretrained(timm: ModuleType, config: TimmConfig, options: dict[str, Any]) -> nn.Module:
    key = "model.backbone.pretrained"
    if not timm.models.is_model_pretrained(config.name):
        raise InputError(f"timm has no weights for {config.name}", key=key, allowed="false, or another model")
    try:
        return timm.create_model(config.name, pretrained=True, **options)
    except (OSError, RuntimeError, ValueError, TypeError, AssertionError) as error:
        _build(timm, config, options)  # raises what is no matter of the weights
        raise InputError(
            f"the weights of {config.name} can be had neither from the cache nor from their source "
            f"({_first_line(error)})",
            key=key,
            allowed="false, a network, or a file as model.backbone.weights",
        ) from error


def _from_file(timm: ModuleType, config: TimmConfig, options: dict[str, Any], path: Path) -> nn.Module:
    key = "model.backbone.weights"
    if not path.is_file():
        raise InputError("there is no such file", file=path, key=key, allowed=".safetensors or .pth")
    try:
        state = dict(timm.models.load_state_dict(str(path), weights_only=True))
    except Exception as error:  # torch's unpickler fails in any way on bytes that it did not write
        allowed = f"weights of {config.name}: .safetensors, or .pth of tensors only"
        problem = f"can't be read ({_first_line(error)})"
        raise InputError(problem, file=path, key=key, allowed=allowed) from error
    classifiers = timm.get_pretrained_cfg(config.name).classifier or ()
    for name in (classifiers,) if isinstance(classifiers, str) else classifiers:
        for parameter in ("weight", "bias"):
            state.pop(f"{name}.{parameter}", None)
    # timm's own loading resamples position embeddings and adapts the first layer to other channels;
    # told that the file has no classes, it is strict about what is missing or left over
    as_it_is = {"state_dict": state, "num_classes": 0, "label_offset": 0}
    try:
        return timm.create_model(config.name, pretrained=True, pretrained_cfg_overlay=as_it_is, **options)
    except (RuntimeError, ValueError, TypeError, KeyError, AssertionError) as error:
        _build(timm, config, options)  # raises what is no matter of the weights
        allowed = f"weights of {config.name}, as timm saves them"
        problem = f"does not fit {config.name}: {error}"
        raise InputError(problem, file=path, key=key, allowed=allowed) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
