"""GradNorm's rule against the paper's formulas, and its measurements against plain autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertune import Taxonomy
from hiertune.config import (
    ConditionalHeadConfig,
    ExcludeConfig,
    GradNormConfig,
    HierarchicalSoftmaxConfig,
    IdentityConfig,
    LinearHeadConfig,
    MLPConfig,
    ModelConfig,
)
from hiertune.errors import InputError
from hiertune.losses import CrossEntropy, level_losses
from hiertune.models import build_model
from hiertune.weighting import GradNorm
from hiertune.weighting.gradnorm import balance, initial_weights, measured_parameters, update_weights

TAXONOMY = Taxonomy.from_parents(["a", "b", "c"], [[-1, -1], [0, 1, 1], [0, 0, 1, 2, 2, -1]])
LEVELS = TAXONOMY.levels
WIDTH = 5


# ------------------------------------------------------------------------------------ the rule


def paper(weights, norms, losses, initial, alpha, lr) -> list[float]:
    """The rule of `update_weights`, task by task."""
    tasks = range(len(weights))
    total = sum(weights)
    weights = [w * len(weights) / total for w in weights]
    active = [
        i for i in tasks if all(math.isfinite(v[i]) and v[i] > 0 for v in (weights, norms, losses, initial))
    ]
    if not active:
        return weights
    weighted = {i: weights[i] * norms[i] for i in active}
    mean_norm = sum(weighted.values()) / len(active)
    left = {i: losses[i] / initial[i] for i in active}
    mean_left = sum(left.values()) / len(active)
    moved = {}
    for i in active:
        target = mean_norm * (left[i] / mean_left) ** alpha
        moved[i] = weights[i] * (target / weighted[i]) ** lr
    scale = sum(weights[i] for i in active) / sum(moved.values())
    return [moved[i] * scale if i in active else weights[i] for i in tasks]


def tasks(values: st.SearchStrategy, count: int) -> st.SearchStrategy:
    return st.lists(st.tuples(values, values, values, values), min_size=1, max_size=count)


usual = st.floats(0.01, 100.0)
unusual = st.floats()  # zero, negative, nan, infinite, too small to divide by


@settings(deadline=None)
@given(tasks(usual, 7), st.floats(0.0, 3.0), st.floats(0.01, 1.0))
def test_update_equals_the_paper(columns, alpha, lr):
    given_ = [list(column) for column in zip(*columns, strict=True)]
    new = update_weights(torch.tensor(given_[0], dtype=torch.float64), *given_[1:], alpha, lr)
    expected = torch.tensor(paper(*given_, alpha, lr), dtype=torch.float64)
    floor = 1e-6 * len(expected) ** 2  # weights are kept above a millionth of all
    torch.testing.assert_close(new, expected, rtol=1e-9, atol=floor)


@settings(deadline=None)
@given(st.lists(st.tuples(usual, unusual, unusual, unusual), min_size=1, max_size=7), st.floats(0.0, 3.0))
def test_weights_stay_positive_finite_and_sum_to_the_number_of_tasks(columns, alpha):
    weights, *measured = (list(column) for column in zip(*columns, strict=True))
    for _ in range(3):
        weights = update_weights(torch.as_tensor(weights, dtype=torch.float64), *measured, alpha, 1.0)
        torch.testing.assert_close(weights.sum().item(), float(len(columns)), rtol=1e-12, atol=0)
        assert ((weights > 0) & weights.isfinite()).all()


@settings(deadline=None)
@given(tasks(usual, 7), st.floats(0.01, 1.0), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_only_ratios_matter(columns, lr, of_norms, of_losses):
    weights, norms, losses, initial = (
        torch.tensor(column, dtype=torch.float64) for column in zip(*columns, strict=True)
    )
    new = update_weights(weights, norms, losses, initial, 1.5, lr)
    scaled = update_weights(3 * weights, norms * of_norms, losses * of_losses, initial, 1.5, lr)
    torch.testing.assert_close(new, scaled, rtol=1e-9, atol=0)


@pytest.mark.parametrize("lr", [0.1, 1.0])
def test_large_gradients_lose_weight_until_all_are_equal(lr):
    weights = torch.ones(3)
    for _ in range(200):
        weights = update_weights(weights, [1.0, 2.0, 4.0], [0.3, 0.6, 0.9], [1.0, 2.0, 3.0], 1.5, lr)
    torch.testing.assert_close(weights, 3 * torch.tensor([4.0, 2.0, 1.0]) / 7, rtol=1e-5, atol=0)


def test_one_update_of_share_1_reaches_the_fixed_point():
    weights = update_weights(torch.ones(3), [1.0, 2.0, 4.0], [1.0] * 3, [1.0] * 3, 0.0, 1.0)
    torch.testing.assert_close(weights, torch.tensor([12.0, 6.0, 3.0]) / 7)
    again = update_weights(weights, [1.0, 2.0, 4.0], [1.0] * 3, [1.0] * 3, 0.0, 1.0)
    torch.testing.assert_close(again, weights)


def test_slow_tasks_gain_weight_with_alpha():
    """The last task has most of its loss left."""
    rule = (torch.ones(3), [1.0] * 3, [0.2, 0.5, 1.0], [1.0] * 3)
    torch.testing.assert_close(update_weights(*rule, 0.0, 1.0), torch.ones(3))
    torch.testing.assert_close(update_weights(*rule, 1.0, 1.0), 3 * torch.tensor([0.2, 0.5, 1.0]) / 1.7)
    slow = [update_weights(*rule, alpha, 0.5)[2].item() for alpha in (0.0, 0.5, 1.5, 3.0)]
    assert slow == sorted(set(slow))


@settings(deadline=None)
@given(tasks(usual, 7), st.floats(0.0, 3.0))
def test_it_descends_the_loss_of_the_paper(columns, alpha):
    """L_grad = sum_i |w_i n_i - target_i|, targets held constant: what it pulls down loses to the rest."""
    weights, *measured = (torch.tensor(c, dtype=torch.float64) for c in zip(*columns, strict=True))
    weights *= len(weights) / weights.sum()
    new = update_weights(weights, *measured, alpha, 0.01)
    _, targets = balance(weights, *measured, alpha)
    weights.requires_grad_()
    paper_loss = (weights * measured[0] - targets).abs().sum()
    (gradient,) = torch.autograd.grad(paper_loss, weights)
    growth = (new / weights).detach()
    falls, rises = growth[gradient > 0], growth[gradient < 0]
    if len(falls) and len(rises):
        assert falls.max() <= rises.min() * (1 + 1e-12)


def test_the_loss_of_the_paper_falls_update_by_update():
    norms, weights = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    losses = [torch.tensor(values, dtype=torch.float64) for values in ([0.3, 0.5, 0.9], [1.0, 1.0, 1.0])]
    seen = []
    for _ in range(30):
        _, targets = balance(weights, norms, *losses, 1.0)  # sum to that of the weighted norms
        # relative to the mean norm, which the scaling to sum T sets
        seen.append(((weights * norms - targets).abs().sum() / (weights * norms).mean()).item())
        weights = update_weights(weights, norms, *losses, 1.0, 0.1)
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] < 0.1 * seen[0]


@pytest.mark.parametrize("absent", [0.0, math.nan, math.inf, -1.0])
@pytest.mark.parametrize("where", [0, 1, 2], ids=["norm", "loss", "initial loss"])
def test_a_task_without_a_measurement_keeps_its_weight(absent, where):
    measured = [[1.0, 2.0, 4.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    measured[where][1] = absent
    weights = update_weights(torch.tensor([0.5, 0.7, 1.8]), *measured, 1.5, 1.0)
    torch.testing.assert_close(weights, torch.tensor([2.3 * 4 / 5, 0.7, 2.3 * 1 / 5]))


def test_without_any_measurement_nothing_moves():
    weights = torch.tensor([0.5, 1.5])
    assert torch.equal(update_weights(weights, [0.0, 0.0], [0.0, 0.0], [math.nan] * 2, 1.5, 0.5), weights)


def test_a_weight_never_reaches_zero_and_can_return():
    weights = torch.ones(2)
    for _ in range(50):
        weights = update_weights(weights, [1.0, 1e30], [1.0] * 2, [1.0] * 2, 0.0, 1.0)
    assert 0 < weights[1] < 1e-5
    for _ in range(50):
        weights = update_weights(weights, [1.0, 1.0], [1.0] * 2, [1.0] * 2, 0.0, 0.5)
    torch.testing.assert_close(weights, torch.ones(2))


def test_it_is_pure_and_keeps_the_kind_of_the_weights():
    weights = torch.tensor([1.0, 1.0])
    measured = [torch.tensor([1.0, 3.0], dtype=torch.float64), torch.ones(2), torch.ones(2)]
    before = [tensor.clone() for tensor in (weights, *measured)]
    new = update_weights(weights, *measured, 1.5, 0.5)
    assert all(map(torch.equal, before, (weights, *measured)))
    assert new.dtype == torch.float32
    assert update_weights([1, 1], [1, 3], [1, 1], [1, 1], 1.5, 0.5).tolist() == new.tolist()
    assert update_weights(weights.double(), *measured, 1.5, 0.5).dtype == torch.float64


def test_balance_gives_rates_and_targets():
    tensors = [[1.0, 2.0, 1.0], [3.0, 0.5, 9.0], [0.4, 0.2, 5.0], [0.8, 0.2, math.nan]]
    rates, targets = balance(*(torch.tensor(t, dtype=torch.float64) for t in tensors), 2.0)
    expected = torch.tensor([0.5 / 0.75, 1.0 / 0.75, math.nan], dtype=torch.float64)
    torch.testing.assert_close(rates, expected, equal_nan=True)
    torch.testing.assert_close(targets, 2.0 * expected**2, equal_nan=True)


# ------------------------------------------------------------------------------------ measuring


def batch(rows: int = 9, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(TAXONOMY.ancestors("c"))[torch.randint(6, (rows,), generator=generator)]
    unknown = torch.rand(rows, 3, generator=generator) < 0.3
    return torch.randn(rows, WIDTH, generator=generator), labels.masked_fill(unknown, -1)


HEADS = {
    "linear": LinearHeadConfig(),
    "hierarchical_softmax": HierarchicalSoftmaxConfig(),
    "conditional": ConditionalHeadConfig(temperature=2.0),
}


def make(head="hierarchical_softmax", backbone=None, dtype=torch.float64):
    torch.manual_seed(0)
    backbone = backbone or MLPConfig(hidden=[8, 6], norm="layer", activation="tanh")
    return build_model(ModelConfig(backbone=backbone, head=HEADS[head]), TAXONOMY, (WIDTH,), None).to(dtype)


def losses_of(logits, labels, known_counts) -> list[torch.Tensor]:
    return level_losses([CrossEntropy()] * 3, logits, labels, known_counts, [None] * 3)


def update(gradnorm, model, inputs, labels, known_counts=None, last=True) -> list[torch.Tensor]:
    """One forward and an update; the losses, for a backward."""
    if known_counts is None:
        known_counts = (labels >= 0).sum(0).to(inputs.dtype)
    losses = losses_of(model(inputs), labels, known_counts)
    gradnorm.update(
        model, losses, known_counts, lambda: losses_of(model.base_logits, labels, known_counts), last
    )
    return losses


@pytest.mark.parametrize("linear_heads", [True, False])
@pytest.mark.parametrize("at", ["features", "last_layer", "backbone"])
@pytest.mark.parametrize("head", HEADS)
def test_norms_are_those_of_plain_autograd(head, at, linear_heads):
    inputs, labels = batch()
    model = make(head)
    gradnorm = GradNorm(GradNormConfig(at=at, linear_heads=linear_heads, lr=0.5), LEVELS)
    update(gradnorm, model, inputs.double(), labels)
    report = gradnorm.report()

    model = make(head)  # again, with a graph of its own per level
    norms, losses = [], []
    for position, level in enumerate(LEVELS):
        features = model.backbone(inputs.double())
        known = labels[:, position] >= 0
        target = labels[known, position]
        logits = {refine: model.head(features, refine=refine)[level][known] for refine in (True, False)}
        differentiated = torch.nn.functional.cross_entropy(logits[not linear_heads], target)
        places = {"features": [features], "last_layer": [model.last_shared_weight]}
        gradients = torch.autograd.grad(differentiated, places.get(at, list(model.backbone.parameters())))
        norms.append(math.sqrt(sum(gradient.square().sum().item() for gradient in gradients)))
        losses.append(torch.nn.functional.cross_entropy(logits[True], target).item())
    for level, norm in zip(LEVELS, norms, strict=True):
        assert report[f"grad_norm/{level}"] == pytest.approx(norm, rel=1e-9)
    expected = update_weights(torch.ones(3), norms, losses, losses, 1.5, 0.5)
    torch.testing.assert_close(gradnorm.weights, expected, rtol=1e-6, atol=0)


def test_rates_follow_the_trained_losses():
    model = make()
    gradnorm = GradNorm(GradNormConfig(linear_heads=True), LEVELS)
    inputs, labels = batch()
    first = torch.stack(update(gradnorm, model, inputs.double(), labels)).detach()
    assert [gradnorm.report()[f"rate/{level}"] for level in LEVELS] == pytest.approx([1.0] * 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    second = torch.stack(update(gradnorm, model, inputs.double(), labels)).detach()
    left = second / first
    rates = [gradnorm.report()[f"rate/{level}"] for level in LEVELS]
    assert rates == pytest.approx((left / left.mean()).tolist(), rel=1e-9)


@pytest.mark.parametrize("at", ["features", "last_layer", "backbone"])
def test_an_update_leaves_gradients_parameters_and_the_graph_alone(at):
    model = make()
    inputs, labels = batch()
    counts = (labels >= 0).sum(0).double()
    plain = torch.stack(losses_of(model(inputs.double()), labels, counts)).sum()
    expected = torch.autograd.grad(plain, list(model.parameters()))
    sum(losses_of(model(inputs.double() + 1), labels, counts)).backward()
    model.head.linear["b"].weight.grad = None  # None must stay None, too
    hooks = [p.register_hook(lambda gradient: pytest.fail("a hook ran")) for p in model.head.parameters()]
    pending = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    before = [p.clone() for p in model.parameters()]

    losses = update(GradNorm(GradNormConfig(at=at), LEVELS), model, inputs.double(), labels)
    for grad, p in zip(pending, model.parameters(), strict=True):
        assert (p.grad is None) if grad is None else torch.equal(p.grad, grad)
    assert all(map(torch.equal, before, model.parameters()))
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    torch.stack(losses).sum().backward()
    for gradient, p in zip(expected, model.parameters(), strict=True):
        assert torch.equal(gradient, p.grad)


@pytest.mark.parametrize("head", HEADS)
def test_an_identity_backbone_is_measured_at_its_inputs(head):
    inputs, labels = batch()
    model = make(head, IdentityConfig(standardize=False))
    gradnorm = GradNorm(GradNormConfig(linear_heads=False), LEVELS)
    update(gradnorm, model, inputs.double(), labels)
    assert not model.features.requires_grad
    z = inputs.double().requires_grad_()
    for position, level in enumerate(LEVELS):
        known = labels[:, position] >= 0
        loss = torch.nn.functional.cross_entropy(model.head(z)[level][known], labels[known, position])
        norm = torch.autograd.grad(loss, z)[0].norm().item()
        assert gradnorm.report()[f"grad_norm/{level}"] == pytest.approx(norm, rel=1e-9)


@pytest.mark.parametrize("at", ["last_layer", "backbone"])
def test_an_identity_backbone_has_no_parameters(at):
    inputs, labels = batch()
    model = make(backbone=IdentityConfig(), dtype=torch.float32)
    with pytest.raises(InputError, match=r"weighting\.at.*\n.*features"):
        update(GradNorm(GradNormConfig(at=at), LEVELS), model, inputs, labels)


def test_a_level_without_known_labels_keeps_its_weight_and_starts_when_first_seen():
    model = make(dtype=torch.float32)
    gradnorm = GradNorm(GradNormConfig(lr=1.0), LEVELS)
    inputs, labels = batch()
    absent = labels.clone()
    absent[:, 1] = -1
    update(gradnorm, model, inputs, absent)
    assert gradnorm.weights[1] == 1.0
    assert not torch.equal(gradnorm.weights, torch.ones(3))
    assert {name for name in gradnorm.report() if name.endswith("/b")} == {"weight/b"}
    initial = gradnorm.state_dict()["initial_losses"]
    assert initial.isnan().tolist() == [False, True, False]

    losses = update(gradnorm, model, inputs, labels)
    later = gradnorm.state_dict()["initial_losses"]
    assert torch.equal(later[[0, 2]], initial[[0, 2]])
    torch.testing.assert_close(later[1].item(), losses[1].item())
    assert gradnorm.weights[1] != 1.0
    weights = gradnorm.weights
    update(gradnorm, model, inputs, torch.full_like(labels, -1))
    torch.testing.assert_close(gradnorm.weights, weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("at", ["features", "last_layer", "backbone"])
def test_half_precision_gradients_do_not_underflow(at, dtype):
    """Losses are means over so many labels that fp16 cannot hold their gradient at a logit."""
    inputs, labels = batch()
    counts = torch.full((3,), 2.0**26)
    gradnorms = [GradNorm(GradNormConfig(at=at), LEVELS) for _ in range(2)]
    update(gradnorms[0], make(dtype=torch.float32), inputs, labels, counts)
    with torch.autocast("cpu", dtype=dtype):
        update(gradnorms[1], make(dtype=torch.float32), inputs, labels, counts)
    full, half = ([gradnorm.report()[f"grad_norm/{level}"] for level in LEVELS] for gradnorm in gradnorms)
    assert half == pytest.approx(full, rel=0.03)


def test_scaling_against_underflow_changes_no_bit():
    """The same rows, said to be 1 or 2**20 of a batch: norms differ by exactly that factor."""
    inputs, labels = batch()
    norms = []
    for count in (1.0, 2.0**20):
        gradnorm = GradNorm(GradNormConfig(), LEVELS)
        update(gradnorm, make(dtype=torch.float32), inputs, labels, torch.full((3,), count))
        norms.append([gradnorm.report()[f"grad_norm/{level}"] * count for level in LEVELS])
    assert norms[0] == norms[1]


def test_updates_come_after_the_warm_up_and_then_every_interval():
    gradnorm = GradNorm(GradNormConfig(interval=4), LEVELS)
    assert [step for step in range(13) if gradnorm.wants_update(step)] == [0, 4, 8, 12]
    gradnorm = GradNorm(GradNormConfig(interval=4, warmup_steps=6), LEVELS)
    assert [step for step in range(16) if gradnorm.wants_update(step)] == [6, 10, 14]


def test_training_goes_on_bit_identically_from_a_state_dict():
    def run(steps, gradnorm):
        model = make(dtype=torch.float32)
        for seed in steps:
            update(gradnorm, model, *batch(seed=seed))
        return gradnorm

    config = GradNormConfig(lr=0.5)
    whole = run(range(4), GradNorm(config, LEVELS))
    resumed = GradNorm(config, LEVELS)
    resumed.load_state_dict(run(range(2), GradNorm(config, LEVELS)).state_dict())
    run(range(2, 4), resumed)
    assert torch.equal(whole.weights, resumed.weights)
    assert whole.report() == resumed.report()
    assert {name.split("/")[0] for name in whole.report()} == {"weight", "grad_norm", "target", "rate"}


# ------------------------------------------------------------------------- whole steps


@pytest.mark.parametrize("linear_heads", [True, False])
@pytest.mark.parametrize("at", ["features", "last_layer", "backbone"])
def test_accumulated_passes_are_one_pass_over_all_rows(at, linear_heads):
    """In the first pass one level is unknown, in the last another."""
    config = GradNormConfig(at=at, linear_heads=linear_heads, accumulate=True, lr=0.5)
    whole, parts = GradNorm(config, LEVELS), GradNorm(config, LEVELS)
    assert parts.whole_step
    assert not GradNorm(GradNormConfig(), LEVELS).whole_step
    for seed in range(2):
        inputs, labels = batch(12, seed)
        labels[:5, 1] = labels[9:, 0] = -1
        counts = (labels >= 0).sum(0).double()
        model = make()
        update(whole, model, inputs.double(), labels, counts)
        before = parts.weights
        for rows, last in ((slice(0, 5), False), (slice(5, 9), False), (slice(9, 12), True)):
            assert parts.weights is before
            update(parts, model, inputs[rows].double(), labels[rows], counts, last)
        torch.testing.assert_close(parts.weights, whole.weights)
        assert parts.report() == pytest.approx(whole.report(), rel=1e-9)
    assert not torch.equal(parts.weights, torch.ones(3))


# ------------------------------------------------------------------------- which parameters


class Odd(torch.nn.Module):
    """A backbone with all that makes picking parameters hard."""

    def __init__(self):
        super().__init__()
        self.position = torch.nn.Parameter(torch.randn(1, WIDTH))
        self.attention = torch.nn.Linear(WIDTH, 7)
        self.multihead = torch.nn.Linear(7, 7)
        self.norm = torch.nn.LayerNorm(7)
        self.tied = torch.nn.Linear(7, 7)
        self.tied.weight = self.multihead.weight
        self.frozen = torch.nn.Linear(7, 7).requires_grad_(False)
        self.blocks = torch.nn.Sequential(torch.nn.Linear(7, 6), torch.nn.BatchNorm1d(6))
        self.out_features = 6

    @property
    def last_shared_weight(self):
        return self.blocks[0].weight


ODD = [
    "position", "attention.weight", "attention.bias", "multihead.weight", "multihead.bias", "norm.weight",
    "norm.bias", "tied.bias", "blocks.0.weight", "blocks.0.bias", "blocks.1.weight", "blocks.1.bias",
]  # fmt: skip


def picked(at="backbone", **exclude) -> list[str]:
    backbone = Odd()
    chosen = measured_parameters(backbone, GradNormConfig(at=at, exclude=ExcludeConfig(**exclude)))
    names = {id(parameter): name for name, parameter in backbone.named_parameters()}
    return [names[id(parameter)] for parameter in chosen]


def without(*names: str) -> list[str]:
    assert set(names) <= set(ODD)
    return [name for name in ODD if name not in names]


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ({}, ODD),
        ({"names": ["head"]}, ODD),
        ({"names": ["multihead"]}, without("multihead.weight", "multihead.bias")),
        ({"names": ["blocks.0"]}, without("blocks.0.weight", "blocks.0.bias")),
        ({"names": ["weight"], "patterns": [r"^pos"]}, [n for n in ODD if n.endswith("bias")]),
        ({"patterns": [r"\.0\.", "head"]}, without("blocks.0.weight", "blocks.0.bias", "multihead.weight",
                                                     "multihead.bias")),
        ({"types": ["LayerNorm"]}, without("norm.weight", "norm.bias")),
        ({"types": ["_NormBase"]}, without("blocks.1.weight", "blocks.1.bias")),
        ({"types": ["Linear", "LayerNorm", "BatchNorm1d"]}, ["position"]),
    ],
)  # fmt: skip
def test_excluded_parameters_are_left_out(exclude, left):
    assert picked(**exclude) == left


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ({}, "blocks.0.weight"),
        ({"types": ["BatchNorm1d"]}, "blocks.0.weight"),
        ({"names": ["blocks.0"]}, "multihead.weight"),
        ({"names": ["blocks", "multihead"]}, "attention.weight"),
    ],
)
def test_the_last_layer_is_the_last_weight_that_is_not_excluded(exclude, left):
    assert picked("last_layer", **exclude) == [left]


@pytest.mark.parametrize("at", ["last_layer", "backbone"])
def test_excluding_everything_is_said(at):
    with pytest.raises(InputError, match=r"(?s)weighting\.exclude.*attention\.weight"):
        picked(at, patterns=["."])
    with pytest.raises(InputError, match=r"weighting\.at.*\n.*features"):
        measured_parameters(Odd().requires_grad_(False), GradNormConfig(at=at))


def test_excluded_parameters_have_no_part_in_the_norm():
    inputs, labels = batch()
    exclude = ExcludeConfig(names=["0"], types=["LayerNorm"])
    gradnorm = GradNorm(GradNormConfig(at="backbone", exclude=exclude, linear_heads=False), LEVELS)
    model = make()
    losses = update(gradnorm, model, inputs.double(), labels)
    left = [model.backbone.layers[4].weight, model.backbone.layers[4].bias]
    for level, loss in zip(LEVELS, losses, strict=True):
        gradients = torch.autograd.grad(loss, left, retain_graph=True)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
        assert gradnorm.report()[f"grad_norm/{level}"] == pytest.approx(norm, rel=1e-9)


# --------------------------------------------------------------------------- initial weights


def labels_with(densities: list[float], rows: int = 20) -> np.ndarray:
    known = [np.arange(rows) < round(share * rows) for share in densities]
    return np.where(np.stack(known, 1), 0, -1)


@pytest.mark.parametrize(
    ("method", "densities", "classes", "expected"),
    [
        ("equal", [1.0, 0.5, 0.1], [2, 4, 8], [1, 1, 1]),
        ("inverse_density", [1.0, 0.5, 0.1], [2, 4, 8], [1, 2, 10]),
        ("inverse_density", [1.0, 0.5, 0.0], [2, 4, 8], [1, 2, 1.5]),
        ("inverse_density", [0.0, 0.0, 0.0], [2, 4, 8], [1, 1, 1]),
        ("class_complexity", [1.0, 0.5, 0.1], [2, 4, 8], [1 / 3, 2 * 2 / 3, 10]),
        ("class_complexity", [0.1, 0.5, 1.0], [1, 4, 8], [1, 2 * 2 / 3, 1]),
        ("class_complexity", [0.1, 0.5, 1.0], [1, 1, 1], [1, 1, 1]),
        ("class_complexity", [0.0, 0.0, 0.0], [2, 4, 8], [1, 1, 1]),
    ],
)
def test_initial_weights(method, densities, classes, expected):
    weights = initial_weights(method, labels_with(densities), classes)
    expected = 3 * torch.tensor(expected, dtype=torch.float64) / sum(expected)
    torch.testing.assert_close(weights, expected.float())


def test_initial_weights_without_rows_are_equal():
    assert initial_weights("inverse_density", np.empty((0, 2), np.int64), [2, 3]).tolist() == [1.0, 1.0]


def test_initial_weights_are_where_updates_start():
    initial = torch.tensor([0.5, 1.0, 1.5])
    gradnorm = GradNorm(GradNormConfig(), LEVELS, initial=initial)
    assert torch.equal(gradnorm.weights, initial)
    inputs, labels = batch()
    labels[:, 1] = -1
    update(gradnorm, make(dtype=torch.float32), inputs, labels)
    assert gradnorm.weights[1] == 1.0
    assert not torch.equal(gradnorm.weights, initial)
