from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hiertune.config import (
    AdamWConfig,
    ConstantConfig,
    CosineConfig,
    MLPConfig,
    ModelConfig,
    SGDConfig,
    TimmConfig,
)
from hiertune.models import build_model
from hiertune.taxonomy import Taxonomy
from hiertune.train.optim import (
    build_optimizer,
    learning_rate_factor,
    parameter_groups,
    set_learning_rate,
)


def factors(config, total):
    return [learning_rate_factor(config, step, total) for step in range(total)]


def test_cosine_with_warm_up():
    values = factors(CosineConfig(warmup=0.1, final=0.2), 100)
    assert values[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert (
        values[54] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * 45 / 90)) / 2) == pytest.approx(0.6)
    )
    assert values[99] == pytest.approx(0.2)


def test_cosine_without_warm_up_starts_at_the_peak():
    values = factors(CosineConfig(warmup=0.0, final=0.0), 5)
    assert values == pytest.approx([1.0, 0.5 + math.sqrt(0.5) / 2, 0.5, 0.5 - math.sqrt(0.5) / 2, 0.0])


def test_constant_stays_after_warm_up():
    assert factors(ConstantConfig(warmup=0.5), 4) == [0.5, 1.0, 1.0, 1.0]
    assert factors(ConstantConfig(), 3) == [1.0, 1.0, 1.0]


@given(
    st.sampled_from([ConstantConfig, CosineConfig]),
    st.floats(0, 1),
    st.integers(1, 50),
)
def test_rises_to_the_peak_once_then_never_again(kind, warmup, total):
    values = factors(kind(warmup=warmup), total)
    peak = values.index(1.0)
    assert all(0 < value <= 1 for value in values)
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)
    assert peak == max(round(warmup * total), 1) - 1


def train(make, steps=3):
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = make([parameter])
    for step in range(steps):
        parameter.grad = torch.full_like(parameter, 0.5 - step) + parameter.detach()
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize(
    ("config", "plain"),
    [
        (
            AdamWConfig(lr=0.1, weight_decay=0.3, betas=(0.8, 0.95)),
            lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3, betas=(0.8, 0.95)),
        ),
        (
            SGDConfig(lr=0.1, momentum=0.7, nesterov=True, weight_decay=0.2),
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.7, nesterov=True, weight_decay=0.2),
        ),
        (SGDConfig(lr=0.1, momentum=0.0), lambda p: torch.optim.SGD(p, lr=0.1)),
    ],
)
def test_fused_equals_plain(config, plain):
    torch.testing.assert_close(train(lambda p: build_optimizer(config, p)), train(plain))


# ------------------------------------------------------------------------------ layer-wise decay


def model_of(backbone, shape=(16, 16, 3)):
    taxonomy = Taxonomy.from_parents(["a", "b"], [[-1, -1], [0, 0, 1]])
    return build_model(ModelConfig(backbone=backbone), taxonomy, shape, None)


def scales(model, config):
    """The share of the learning rate of every parameter, by name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, config)
    return {names[parameter]: group["lr_scale"] for group in groups for parameter in group["params"]}


def test_without_decay_there_is_one_group_in_the_model_s_order():
    model = model_of(MLPConfig(hidden=[4]))
    (group,) = parameter_groups(model, AdamWConfig())
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    assert group["lr_scale"] == 1.0


def test_layers_of_a_transformer_decay_towards_the_input():
    pytest.importorskip("timm")
    model = model_of(TimmConfig(name="test_vit", image_size=32, hidden=[5]))
    of = scales(model, AdamWConfig(layer_decay=0.5, weight_decay=0.3))
    assert of.keys() == {name for name, _ in model.named_parameters()}
    assert {of[name] for name in of if not name.startswith("backbone.body.")} == {1.0}
    assert of["backbone.body.norm.weight"] == 0.5
    blocks = [of[f"backbone.body.blocks.{i}.mlp.fc1.weight"] for i in range(6)]
    assert blocks == [0.5**n for n in (6, 5, 4, 3, 2, 1)]
    assert of["backbone.body.patch_embed.proj.weight"] == 0.5**7
    groups = parameter_groups(model, AdamWConfig(layer_decay=0.5, weight_decay=0.3))
    assert all(group.get("weight_decay", 0.3) == 0.3 for group in groups)
    assert groups[-1]["lr_scale"] == 1.0


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet"])
def test_layers_decay_as_in_timm_s_own_model_with_a_classifier(name):
    """Some models' last norm is in the classifier's layer, whether there is a classifier or not."""
    import timm
    from timm.optim import param_groups_layer_decay

    whole = timm.create_model(name, num_classes=3)
    groups = param_groups_layer_decay(whole, layer_decay=0.5)
    of = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    expected = {f"backbone.body.{name}": of[id(parameter)] for name, parameter in whole.named_parameters()}
    found = scales(model_of(TimmConfig(name=name)), SGDConfig(layer_decay=0.5))
    body = {name: scale for name, scale in found.items() if name.startswith("backbone.body.")}
    assert body == {name: expected[name] for name in body}
    assert len(body) > 10


def test_the_schedule_multiplies_each_group_s_own_peak():
    pytest.importorskip("timm")
    model = model_of(TimmConfig(name="test_resnet", image_size=32))
    config = SGDConfig(lr=0.2, momentum=0.0, layer_decay=0.5)
    optimizer = build_optimizer(config, parameter_groups(model, config))
    set_learning_rate(optimizer, 0.1)
    of = scales(model, config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name] - 0.1 * of[name])
    assert len(set(of.values())) > 4


def test_frozen_backbones_are_in_no_group():
    pytest.importorskip("timm")
    model = model_of(TimmConfig(name="test_resnet", image_size=32, frozen=True))
    assert set(scales(model, SGDConfig(layer_decay=0.5))) == {
        name for name, _ in model.named_parameters() if name.startswith("head.")
    }
