"""What every kind of head must do. A new kind is one more line in `HEADS`, and one case in `routed`."""

from __future__ import annotations

import math
import typing
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from hiertune import Taxonomy
from hiertune.config import HeadConfig
from hiertune.models import HierarchicalHead

HEADS = [
    {"kind": "linear"},
    {"kind": "hierarchical_softmax"},
    {"kind": "hierarchical_softmax", "bias": False, "floor": 0.01},
    {"kind": "conditional"},
    {"kind": "conditional", "routing": "soft", "temperature": 0.4},
    {"kind": "conditional", "routing": "hard", "temperature": 3.0},
    {"kind": "conditional", "routing": "gumbel", "temperature": 0.7, "bias": False},
]
TAXONOMIES = {
    "tree": Taxonomy.from_parents(["a", "b", "c"], [[-1], [0, 0, 0], [2, 0, 1, 0, 2]]),
    "forest": Taxonomy.from_parents(["a", "b", "c"], [[-1, -1], [1, 0, 1], [2, 1, 0, 2, 2, 0]]),
    "orphans": Taxonomy.from_parents(["a", "b", "c"], [[-1, -1, -1], [-1, 2, 0, -1], [3, -1, 0, 1, 1]]),
    "all orphans": Taxonomy.from_parents(["a", "b", "c"], [[-1, -1], [-1, -1], [1, 0, 1]]),
    "one level": Taxonomy.from_parents(["a"], [[-1] * 4]),
    "unary": Taxonomy.from_parents(["a", "b"], [[-1], [0]]),
}
FEATURES, BATCH = 4, 7


@pytest.fixture(params=HEADS, ids=lambda settings: "-".join(map(str, settings.values())))
def settings(request) -> dict:
    return request.param


@pytest.fixture(params=TAXONOMIES, ids=str)
def taxonomy(request) -> Taxonomy:
    return TAXONOMIES[request.param]


@pytest.fixture(params=[True, False], ids=["train", "eval"])
def training(request) -> bool:
    return request.param


@pytest.fixture
def head(settings, taxonomy, training) -> HierarchicalHead:
    torch.manual_seed(0)
    return HierarchicalHead(FEATURES, taxonomy, **settings).double().train(training)


@pytest.fixture
def features() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (5 * torch.randn(BATCH, FEATURES, generator=generator, dtype=torch.float64)).requires_grad_()


def routed(logits: torch.Tensor, settings: dict, training: bool) -> torch.Tensor:
    """r of the documentation, `[B, parents]`."""
    routing, temperature = settings.get("routing", "soft"), settings.get("temperature", 1.0)
    if routing == "hard" and not training:
        one_hot = torch.zeros_like(logits)
        one_hot[torch.arange(len(logits)), logits.argmax(1)] = 1.0
        return one_hot
    if routing == "gumbel" and training:
        logits = logits - torch.log(-torch.log(torch.rand_like(logits)))
    return torch.softmax(logits / temperature, 1)


def dense(head: HierarchicalHead, taxonomy: Taxonomy, features, settings, training) -> dict:
    """base + log(r(parent) @ H + floor), with H written out; nothing is added for roots and orphans."""
    floor = settings.get("floor", 1e-10)
    base = {level: features @ layer.weight.T for level, layer in head.linear.items()}
    for level, layer in head.linear.items():
        if layer.bias is not None:
            base[level] = base[level] + layer.bias
    if settings["kind"] == "linear":
        return base
    logits = {taxonomy.levels[0]: base[taxonomy.levels[0]]}
    for position, (above, level) in enumerate(pairwise(taxonomy.levels), start=1):
        parents = taxonomy.parents[position].tolist()
        matrix = torch.zeros(taxonomy.num_classes[position - 1], len(parents), dtype=torch.float64)
        for child, parent in enumerate(parents):
            if parent >= 0:
                matrix[parent, child] = 1.0
        prior = torch.log(routed(logits[above], settings, training) @ matrix + floor)
        orphans = torch.tensor([parent < 0 for parent in parents])
        logits[level] = base[level] + torch.where(orphans, 0.0, prior)
    return logits


def test_every_kind_and_routing_is_tested():
    configs = typing.get_args(typing.get_args(HeadConfig)[0])
    kinds = {config.model_fields["kind"].default for config in configs}
    assert {settings["kind"] for settings in HEADS} == kinds
    routings = set(typing.get_args(configs[-1].model_fields["routing"].annotation))
    assert {settings.get("routing", "soft") for settings in HEADS} == routings


def test_logits_and_gradients_equal_the_dense_formula(head, taxonomy, features, settings, training):
    torch.manual_seed(3)
    ours = head(features)
    torch.manual_seed(3)
    theirs = dense(head, taxonomy, features, settings, training)
    assert list(ours) == list(taxonomy.levels)
    leaves = [features, *head.parameters()]
    for level in taxonomy.levels:
        torch.testing.assert_close(ours[level], theirs[level], rtol=0, atol=1e-10)
        weights = torch.randn(ours[level].shape, dtype=torch.float64)
        pair = [
            torch.autograd.grad((logits[level] * weights).sum(), leaves, retain_graph=True, allow_unused=True)
            for logits in (ours, theirs)
        ]
        for of_ours, of_theirs in zip(*pair, strict=True):
            assert (of_ours is None) == (of_theirs is None)
            if of_ours is not None:
                torch.testing.assert_close(of_ours, of_theirs, rtol=0, atol=1e-10)


def test_without_refinement_it_gives_the_linear_layers(head, features):
    base = head(features, refine=False)
    for level, linear in head.linear.items():
        assert torch.equal(base[level], linear(features))
    assert all(map(torch.equal, head.base(features).values(), base.values()))


def test_refining_the_base_logits_equals_the_forward(head, features):
    torch.manual_seed(3)
    whole = head(features)
    torch.manual_seed(3)
    parts = head.refine(head.base(features))
    assert all(map(torch.equal, whole.values(), parts.values()))
    if not head.refines:
        assert all(map(torch.equal, whole.values(), head.base(features).values()))


def test_each_linear_layer_runs_once(head, features):
    calls = []
    for level, linear in head.linear.items():
        linear.register_forward_hook(lambda *_, level=level: calls.append(level))
    head(features)
    assert calls == list(head.levels)


def test_rows_do_not_see_one_another_in_evaluation(head, features):
    head.eval()
    alone = head(features[2:3])
    together = head(features)
    for level in head.levels:
        torch.testing.assert_close(alone[level][0], together[level][2])


def test_input_gradient_is_that_of_autograd(head, features):
    base = head(features, refine=False)
    generator = torch.Generator().manual_seed(2)
    gradients = {
        level: torch.randn(logits.shape, generator=generator, dtype=torch.float64)
        for level, logits in base.items()
    }
    (expected,) = torch.autograd.grad(list(base.values()), features, list(gradients.values()))
    torch.testing.assert_close(head.input_gradient(gradients), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_logits_stay_finite_under_autocast(head, features, dtype):
    head.float()
    inputs = (20 * features.detach().float()).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        logits = head(inputs)
    losses = [F.cross_entropy(scores.float(), scores.argmin(1)) for scores in logits.values()]
    gradients = torch.autograd.grad(sum(losses), [inputs, *head.parameters()])
    assert all(tensor.isfinite().all() for tensor in (*logits.values(), *gradients))
    if head.refines:
        assert {tensor.dtype for tensor in logits.values()} == {torch.float32}


def test_holds_no_more_than_one_number_per_class_beside_its_layers(head, taxonomy):
    assert sum(buffer.numel() for buffer in head.buffers()) <= taxonomy.num_nodes
    assert len(head.state_dict()) == len(list(head.parameters()))


def test_state_dict_round_trip(head, settings, taxonomy, training, features):
    torch.manual_seed(99)
    other = HierarchicalHead(FEATURES, taxonomy, **settings).double().train(training)
    assert not torch.equal(other(features)["a"], head(features)["a"])
    other.load_state_dict(head.state_dict())
    torch.manual_seed(3)
    ours = head(features)
    torch.manual_seed(3)
    assert all(map(torch.equal, ours.values(), other(features).values()))


@pytest.mark.parametrize("settings", HEADS[1:])
def test_a_hopeless_parent_costs_the_floor(settings, training):
    taxonomy = Taxonomy.from_parents(["a", "b"], [[-1, -1], [0, 1]])
    head = HierarchicalHead(1, taxonomy, **settings | {"bias": True}).double().train(training)
    with torch.no_grad():
        for linear in head.linear.layers:
            linear.weight.zero_()
            linear.bias.zero_()
        head.linear["a"].bias[0] = 10_000.0
    logits = head(torch.ones(1, 1, dtype=torch.float64))["b"][0]
    floor = math.log(settings.get("floor", 1e-10))
    torch.testing.assert_close(logits.tolist(), [math.log1p(math.exp(floor)), floor], rtol=0, atol=1e-9)
