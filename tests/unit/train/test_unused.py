"""Parameters that the training loss does not reach, alone and under DDP."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hiertune import Taxonomy
from hiertune.config import GradNormConfig, IdentityConfig, MLPConfig, ModelConfig
from hiertune.models import build_model
from hiertune.train.unused import may_leave_unused, note_on, unused_parameters

TAXONOMY = Taxonomy.from_parents(["a", "b"], [[-1, -1], [0, 1, 1]])


class Odd(nn.Module):
    """Uses one branch, in training; normalises, drops out."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)
        self.auxiliary = nn.Linear(5, 2)
        self.evaluated = nn.Parameter(torch.zeros(5))
        self.frozen = nn.Parameter(torch.zeros(5), requires_grad=False)

    def forward(self, x):
        x = torch.dropout(self.norm(self.used(x)), 0.5, self.training)
        return x if self.training else x + self.evaluated


def make(backbone=None):
    torch.manual_seed(0)
    model = build_model(ModelConfig(backbone=MLPConfig(hidden=[5])), TAXONOMY, (4,), None)
    if backbone is not None:
        model.backbone = backbone
    return model


def test_what_no_logit_depends_on_is_found():
    assert unused_parameters(make(), torch.randn(2, 4)) == []
    expected = ["backbone.evaluated", "backbone.auxiliary.weight", "backbone.auxiliary.bias"]
    assert unused_parameters(make(Odd()), torch.randn(2, 4)) == expected


def test_looking_leaves_no_trace():
    model = make(Odd())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = torch.randn(2, 4)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with torch.no_grad():
        assert unused_parameters(model, inputs)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all((parameter.grad == 1).all() for parameter in model.parameters())
    assert model.features is None
    assert model.training


def test_only_backbones_of_unknown_structure_are_looked_at():
    assert not may_leave_unused(make())
    identity = build_model(ModelConfig(backbone=IdentityConfig()), TAXONOMY, (4,), None)
    assert not may_leave_unused(identity)
    assert may_leave_unused(make(Odd()))


def test_the_note_is_short():
    say = "find_unused_parameters is on: the training loss does not reach"
    assert note_on(["x"]) == f"{say} 1 parameter (x)"
    assert note_on(["a", "b", "c"]) == f"{say} 3 parameters (a, b, c)"
    assert note_on([*"abcde"]) == f"{say} 5 parameters (a, b, c, ...)"


# ------------------------------------------------------------------------------------ under DDP

NOTE = note_on(["backbone.spare.weight", "backbone.spare.bias"])


@pytest.fixture(scope="module")
def data(make_data):
    return make_data()


def test_two_workers_wait_in_vain_where_it_is_not_noticed(config, data, pair):
    """What the note is there for: without `find_unused_parameters` DDP fails in the second step."""
    for record in pair(config(), data, spare="unnoticed"):
        assert isinstance(record["error"], RuntimeError)
        assert "find_unused_parameters=True" in str(record["error"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accumulation": 3},
        {"norm": "batch", "batch_size": 7},
        {"weighting": GradNormConfig(interval=1, linear_heads=False)},
        {"weighting": GradNormConfig(interval=1, at="backbone", accumulate=True), "accumulation": 2},
    ],
    ids=["plain", "accumulation", "batch norm", "gradnorm", "gradnorm at the backbone"],
)
def test_two_workers_with_unused_parameters_agree_with_one(config, data, alone, pair, changes):
    settings = config(**changes)
    one = alone(settings, data, spare="noticed")
    first, second = pair(settings, data, spare="noticed")
    assert first["outcome"] == second["outcome"]
    assert first["outcome"].metrics == pytest.approx(one["outcome"].metrics, rel=2e-4, abs=1e-6)
    assert [result.notes for result in one["reports"]] == [(), (), ()]
    assert [result.notes for result in first["reports"]] == [(NOTE,), (), ()]


def test_a_model_that_uses_everything_is_not_noted(config, data, pair):
    first, _ = pair(config(epochs=1), data)
    assert first["reports"][0].notes == ()


def test_the_note_comes_again_when_a_trial_goes_on(config, data, pair, tmp_path):
    checkpoint = {"checkpoint": tmp_path / "checkpoint", "spare": "noticed"}
    pair(config(), data, stop_at=1, **checkpoint)
    first, _ = pair(config(), data, **checkpoint)
    assert [result.notes for result in first["reports"]] == [(NOTE,), ()]
