"""timm's models as backbones: widths, pixels, weights, freezing."""

from __future__ import annotations

import builtins

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from hiertune.config import TimmConfig
from hiertune.errors import InputError
from hiertune.models.timm_backbone import Pixels, TimmBackbone, image_size

timm = pytest.importorskip("timm")

FAMILIES = [
    "resnet18",
    "mobilenetv3_small_100",
    "vit_tiny_patch16_224",
    "convnext_atto",
    "efficientnet_b0",
    "test_maxvit",
    "test_mambaout",
    "test_nfnet",
    "test_vit3",
    "test_byobnet",
]


def images(rows=2, size=20, channels=3):
    return torch.randint(0, 256, (rows, size, size, channels), dtype=torch.uint8)


def backbone(name="test_resnet", shape=(20, 20, 3), size=32, **settings):
    return TimmBackbone(shape, TimmConfig(name=name, image_size=size, **settings))


@pytest.mark.parametrize("name", FAMILIES)
def test_width_and_last_shared_weight_of_every_family(name):
    """The last weight takes part: gradients of the features reach it."""
    model = backbone(name, size=64)
    with (
        torch.no_grad()
    ):  # of some the last norm of a block is 0 at first, and so are the gradients before it
        for parameter in model.body.parameters():
            parameter.add_(0.01)
    out = model(images())
    assert out.shape == (2, model.out_features)
    (gradient,) = torch.autograd.grad(out.square().sum(), model.last_shared_weight)
    assert gradient.abs().sum() > 0


def test_swin_takes_its_window_from_the_image_size():
    model = backbone("swin_tiny_patch4_window7_224", size=56)
    assert model(images(1)).shape == (1, model.out_features) == (1, 768)


def test_by_default_images_get_the_size_that_the_model_was_trained_with():
    assert image_size(TimmConfig(name="test_resnet")) == 160
    assert image_size(TimmConfig(name="test_resnet", image_size=40)) == 40
    model = backbone(size=None)
    assert model.pixels(images()).shape == (2, 3, 160, 160)


def test_pixels_are_resized_and_normalised_as_the_model_expects():
    given = images(3, size=24)
    settings = timm.data.resolve_model_data_config(timm.create_model("test_resnet"))
    unit = given.permute(0, 3, 1, 2).double() / 255
    resized = F.interpolate(unit, (32, 32), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(settings[name])[:, None, None] for name in ("mean", "std"))
    expected = ((resized - mean) / std).float()
    model = backbone(shape=(24, 24, 3))
    pixels = model.pixels(given)
    torch.testing.assert_close(pixels, expected, rtol=1e-4, atol=1e-5)
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model.pixels(given.float()), pixels)  # float images have the same units
    assert backbone(channels_last=False).pixels(given).is_contiguous()


def test_pixels_leave_float_images_as_they_are():
    given = images(2, size=32).float()
    before = given.clone()
    backbone().pixels(given)
    assert torch.equal(given, before)


@pytest.mark.parametrize(
    ("channels", "mean"),
    [(1, [0.45]), (2, [0.485, 0.456]), (4, [0.485, 0.456, 0.406, 0.485])],
)
def test_any_number_of_channels(channels, mean):
    model = backbone("resnet18", shape=(20, 20, channels))
    assert model(images(channels=channels)).shape == (2, 512)
    if channels == 1:
        mean = [sum((0.485, 0.456, 0.406)) / 3]
    torch.testing.assert_close(model.pixels.mean.flatten() / 255, torch.tensor(mean))


def test_hidden_layers_dropout_and_length():
    model = backbone(hidden=[12, 7], dropout=0.5, feature_length=3.0).eval()
    given = images(4)
    first, second = (layer for layer in model.layers if isinstance(layer, torch.nn.Linear))
    pooled = model.body(model.pixels(given))
    expected = F.relu(
        F.linear(F.relu(F.linear(pooled, first.weight, first.bias)), second.weight, second.bias)
    )
    torch.testing.assert_close(model(given), 3 * F.normalize(expected, dim=1))
    torch.testing.assert_close(model(pooled), model(given))  # pooled features, computed before
    assert model.last_shared_weight is second.weight
    assert model.out_features == 7
    model.train()
    assert not torch.equal(model(pooled), model(pooled))


def test_frozen_bodies_stay_in_evaluation():
    model = backbone(frozen=True, hidden=[4]).train()
    before = {name: value.clone() for name, value in model.body.state_dict().items()}
    given = images(8)
    assert torch.equal(model.pooled(given), model.pooled(given))
    model(given).sum().backward()
    assert all(torch.equal(before[name], value) for name, value in model.body.state_dict().items())
    assert all(parameter.grad is None for parameter in model.body.parameters())
    assert model.layers.training
    assert not model.body.training
    assert model.last_shared_weight is model.layers[1].weight
    assert backbone(frozen=True).last_shared_weight is None


# --------------------------------------------------------------------------------------- weights


def save(model, path):
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3}, path)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_of_a_file(tmp_path, name, suffix):
    sized = {"img_size": 32} if name == "test_vit" else {}
    saved = timm.create_model(name, num_classes=13, **sized).eval()
    save(saved, tmp_path / f"w{suffix}")
    model = backbone(name, weights=str(tmp_path / f"w{suffix}")).eval()
    x = model.pixels(images())
    expected = saved.forward_head(saved.forward_features(x), pre_logits=True)
    torch.testing.assert_close(model.body(x), expected)


def test_weights_of_a_file_fit_other_sizes_and_channels(tmp_path):
    """As timm does: position embeddings are resampled, and one channel is the sum of three."""
    saved = timm.create_model("test_vit")
    save(saved, tmp_path / "w.pth")
    model = backbone("test_vit", (20, 20, 1), 64, weights=str(tmp_path / "w.pth"))
    torch.testing.assert_close(
        model.body.patch_embed.proj.weight, saved.patch_embed.proj.weight.sum(1, keepdim=True)
    )
    assert model.body.pos_embed.shape != saved.pos_embed.shape
    save(backbone("test_resnet", (20, 20, 2)).body, tmp_path / "two.pth")
    assert backbone("test_resnet", (20, 20, 2), weights=str(tmp_path / "two.pth"))(images(channels=2)).shape


def test_weights_can_be_left_for_later(tmp_path):
    config = TimmConfig(name="test_resnet", weights=str(tmp_path / "gone.pth"))
    TimmBackbone((20, 20, 3), config, load_weights=False)
    TimmBackbone((20, 20, 3), TimmConfig(name="test_resnet", pretrained=True), load_weights=False)


def refused(**settings):
    with pytest.raises(InputError) as caught:
        backbone(**settings)
    return caught.value


def test_a_file_of_other_weights_is_refused(tmp_path):
    path = tmp_path / "w.pth"
    state = timm.create_model("test_resnet").state_dict()
    value = state.pop("layer1.0.conv1.weight")
    torch.save({**state, "extra.weight": value}, path)
    error = refused(weights=str(path))
    assert error.key == "model.backbone.weights"
    assert str(path) in str(error)
    assert "layer1.0.conv1.weight" in error.problem
    assert "extra.weight" in error.problem


class Code:
    def __reduce__(self):
        return print, ("code of a weights file ran",)


@pytest.mark.parametrize("content", [b"", b"garbage", b".", "code", "list"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_that_holds_no_weights_is_refused(tmp_path, content, suffix, capsys):
    path = tmp_path / f"w{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save({"state_dict": Code()} if content == "code" else [1, 2], path)
    assert "can't be read" in refused(weights=str(path)).problem
    assert "ran" not in capsys.readouterr().out


def test_pretrained_weights_that_cannot_be_had(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    error = refused(pretrained=True)
    assert error.key == "model.backbone.pretrained"
    assert error.problem.startswith("the weights of test_resnet can be had neither from the cache nor")
    none = next(name for name in timm.list_models("vit_*") if not timm.models.is_model_pretrained(name))
    assert "timm has no weights" in refused(name=none, pretrained=True).problem


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "key", "words"),
    [
        ({"name": "resnet81"}, "name", "no model 'resnet81' (did you mean 'resnet"),
        (
            {"name": "resnet18.a1_in2k"},
            "name",
            "no set of weights 'resnet18.a1_in2k' (did you mean 'resnet18.a1_in1k'?)",
        ),
        ({"name": "vgg11", "drop_path": 0.1}, "drop_path", "no residual branches"),
        ({"name": "test_resnet", "shape": (7,)}, "kind", "need images"),
        ({"name": "test_vit", "weights": "nowhere.pth"}, "weights", "no such file"),
    ],
)
def test_what_cannot_be_built_is_one_message(settings, key, words):
    error = refused(**settings)
    assert error.key == f"model.backbone.{key}"
    assert words in error.problem


def test_without_timm(monkeypatch):
    plain = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "timm":
            raise ImportError("No module named 'timm'")
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    error = refused()
    assert "timm" in error.problem
    assert error.allowed == 'pip install "hiertune[vision]"'


def test_pixels_have_statistics_in_the_state_dict():
    """An exported model does not depend on what a later timm says of it."""
    assert set(Pixels(8, [0.5], [0.5], torch.channels_last).state_dict()) == {"mean", "std"}
