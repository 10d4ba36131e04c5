"""Backbone and head together, and what is built from a config."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from hiertune import Taxonomy
from hiertune.config import (
    ConditionalHeadConfig,
    HierarchicalSoftmaxConfig,
    IdentityConfig,
    LinearHeadConfig,
    MixedHeadConfig,
    MLPConfig,
    ModelConfig,
    PathSoftmaxConfig,
)
from hiertune.models import MLP, Identity, LevelSettings, build_model

TAXONOMY = Taxonomy.from_parents(["a", "b"], [[-1, -1], [0, 0, 1]])
STATISTICS = (torch.full((5,), 1.0), torch.full((5,), 2.0))


def make(head=None, backbone=None, shape=(5,), statistics=STATISTICS):
    torch.manual_seed(0)
    config = ModelConfig(backbone=backbone or MLPConfig(hidden=[6]), head=head or HierarchicalSoftmaxConfig())
    return build_model(config, TAXONOMY, shape, statistics)


def inputs() -> torch.Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


def test_forward_is_the_head_of_the_backbone_and_keeps_both_parts():
    model = make()
    logits = model(inputs())
    features = model.backbone(inputs())
    assert torch.equal(model.features, features)
    for level in TAXONOMY.levels:
        assert torch.equal(logits[level], model.head(features)[level])
        assert torch.equal(model.base_logits[level], model.head.linear[level](features))
    assert not torch.equal(logits["b"], model.base_logits["b"])


def test_what_is_kept_belongs_to_the_graph_of_the_logits():
    model = make()
    logits = model(inputs())
    tensors = [model.features, *model.base_logits.values(), model.last_shared_weight]
    gradients = torch.autograd.grad(logits["b"].logsumexp(1).sum(), tensors)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_release_frees_the_graph():
    model = make()
    model(inputs())
    features = weakref.ref(model.features)
    model.release()
    gc.collect()
    assert model.features is None
    assert model.base_logits is None
    assert features() is None


def test_what_is_kept_is_no_state():
    model = make()
    before = set(model.state_dict())
    model(inputs())
    assert set(model.state_dict()) == before


CONDITIONAL = ConditionalHeadConfig(
    routing="hard", temperature=3.0, final_temperature=0.5, temperature_schedule="cosine", floor=0.2
)


@pytest.mark.parametrize(
    "config",
    [LinearHeadConfig(bias=False), HierarchicalSoftmaxConfig(floor=0.1), CONDITIONAL, PathSoftmaxConfig()],
)
def test_build_follows_the_head_config(config):
    head = make(config).head
    expected = LevelSettings(**config.model_dump())
    assert head.kind == config.kind
    assert head.settings == {"a": expected, "b": expected}
    assert (head.linear["a"].bias is None) == (not config.bias)
    assert head.linear["a"].in_features == 6
    assert head.progress == 1.0


def test_build_follows_the_config_of_every_level():
    head = make(MixedHeadConfig(levels={"b": CONDITIONAL}, default=LinearHeadConfig(bias=False))).head
    assert head.kind == "mixed"
    assert head.settings == {
        "a": LevelSettings("linear", bias=False),
        "b": LevelSettings(**CONDITIONAL.model_dump()),
    }
    assert head.linear["a"].bias is None
    assert head.linear["b"].bias is not None


@pytest.mark.parametrize(("config", "kind"), [(MLPConfig(hidden=[7, 3]), MLP), (IdentityConfig(), Identity)])
def test_build_follows_the_backbone_config(config, kind):
    model = make(backbone=config)
    assert type(model.backbone) is kind
    assert model.head.linear["a"].in_features == (3 if kind is MLP else 5)
    assert torch.equal(model.backbone.inputs[0].mean, STATISTICS[0])
    assert model.last_shared_weight is model.backbone.last_shared_weight


def test_images_enter_flattened():
    model = make(shape=(2, 3, 4), statistics=None)
    assert model(torch.zeros(2, 2, 3, 4, dtype=torch.uint8))["b"].shape == (2, 3)


def test_same_seed_same_weights():
    assert all(map(torch.equal, make().state_dict().values(), make().state_dict().values()))
