"""What every kind of head must do. A new kind is one more line in `HEADS`, and one case in `definition`."""

from __future__ import annotations

import math
import typing

import pytest
import torch
import torch.nn.functional as F

from hiertune import Taxonomy
from hiertune.config import ConditionalHeadConfig, HeadConfig
from hiertune.models import HierarchicalHead

PROGRESS = 0.25
HEADS = [
    {"kind": "linear"},
    {"kind": "hierarchical_softmax"},
    {"kind": "hierarchical_softmax", "bias": False, "floor": 0.01},
    {"kind": "conditional", "temperature": 0.4},
    {"kind": "conditional", "routing": "hard", "temperature": 4.0, "final_temperature": 0.5},
    {
        "kind": "conditional",
        "routing": "gumbel",
        "temperature": 2.0,
        "final_temperature": 0.3,
        "temperature_schedule": "cosine",
        "bias": False,
    },
    {
        "kind": "conditional",
        "routing": "soft",
        "final_temperature": 3.0,
        "temperature_schedule": "linear",
    },
    {"kind": "path_softmax"},
    {"kind": "mixed", "levels": {"a": {"kind": "path_softmax"}, "b": {"kind": "linear", "bias": False}}},
    {
        "kind": "mixed",
        "levels": {"b": {"kind": "conditional", "routing": "hard", "temperature": 0.5, "floor": 1e-3}},
        "default": {"kind": "path_softmax", "bias": False},
    },
    {
        "kind": "mixed",
        "levels": {
            "a": {"kind": "hierarchical_softmax"},
            "b": {"kind": "path_softmax"},
            "c": {"kind": "conditional", "routing": "gumbel", "final_temperature": 2.0},
        },
        "default": {"kind": "linear"},
    },
]
THREE_LEVELS = ["a", "b", "c"]
TAXONOMIES = {
    "forest": Taxonomy.from_parents(THREE_LEVELS, [[-1, -1], [1, 0, 1], [2, 1, 0, 2, 2, 0]]),
    "childless": Taxonomy.from_parents(THREE_LEVELS, [[-1, -1, -1], [2, 0, 0], [2, 0, 0, 2]]),
    "orphans": Taxonomy.from_parents(THREE_LEVELS, [[-1, -1, -1], [-1, 2, 0, -1], [3, -1, 0, 1, 1]]),
    "all orphans": Taxonomy.from_parents(THREE_LEVELS, [[-1, -1], [-1, -1], [1, 0, 1]]),
    "one level": Taxonomy.from_parents(["a"], [[-1] * 4]),
    "one root": Taxonomy.from_parents(["a", "b"], [[-1], [0, 0]]),
    "unary": Taxonomy.from_parents(["a", "b"], [[-1], [0]]),
}
FEATURES, BATCH = 4, 7


@pytest.fixture(params=TAXONOMIES, ids=str)
def taxonomy(request) -> Taxonomy:
    return TAXONOMIES[request.param]


@pytest.fixture(params=HEADS, ids=lambda settings: f"{settings['kind']}-{HEADS.index(settings)}")
def settings(request, taxonomy) -> dict:
    settings = request.param
    if "levels" in settings:  # only those that this taxonomy has
        named = {level: own for level, own in settings["levels"].items() if level in taxonomy.levels}
        settings = settings | {"levels": named}
    return settings


@pytest.fixture(params=[True, False], ids=["train", "eval"])
def training(request) -> bool:
    return request.param


in_evaluation = pytest.mark.parametrize("training", [False], ids=["eval"])


@pytest.fixture
def head(settings, taxonomy, training) -> HierarchicalHead:
    torch.manual_seed(0)
    head = HierarchicalHead(FEATURES, taxonomy, **settings).double().train(training)
    head.progress = PROGRESS
    return head


@pytest.fixture
def features() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (5 * torch.randn(BATCH, FEATURES, generator=generator, dtype=torch.float64)).requires_grad_()


def of_level(settings: dict, level: str) -> dict:
    """The settings of one level."""
    if settings["kind"] != "mixed":
        return settings
    return settings["levels"].get(level, settings.get("default", {"kind": "hierarchical_softmax"}))


def temperature_of(settings: dict) -> float:
    start = settings.get("temperature", 1.0)
    end = settings.get("final_temperature", start)
    match settings.get("temperature_schedule", "exponential"):
        case "linear":
            return start + PROGRESS * (end - start)
        case "cosine":
            return end + (start - end) * (1 + math.cos(PROGRESS * math.pi)) / 2
        case "exponential":
            return start * (end / start) ** PROGRESS


def routed(logits: torch.Tensor, settings: dict, training: bool) -> torch.Tensor:
    """r of the documentation, `[B, parents]`."""
    routing, temperature = settings.get("routing", "soft"), temperature_of(settings)
    if routing == "hard" and not training:
        one_hot = torch.zeros_like(logits)
        one_hot[torch.arange(len(logits)), logits.argmax(1)] = 1.0
        return one_hot
    if routing == "gumbel" and training:
        logits = logits - torch.log(-torch.log(torch.rand_like(logits)))
    return torch.softmax(logits / temperature, 1)


def with_prior(base: torch.Tensor, above: torch.Tensor, parents: list[int], settings, training):
    """base + log(r(parent) @ H + floor), with H written out; nothing is added for orphans."""
    matrix = torch.zeros(above.shape[1], len(parents), dtype=torch.float64)
    for child, parent in enumerate(parents):
        if parent >= 0:
            matrix[parent, child] = 1.0
    prior = torch.log(routed(above, settings, training) @ matrix + settings.get("floor", 1e-10))
    orphans = torch.tensor([parent < 0 for parent in parents])
    return base + torch.where(orphans, 0.0, prior)


def along_the_path(base: torch.Tensor, above: torch.Tensor, parents: list[int]) -> torch.Tensor:
    """Log-probabilities class by class, `above` being the probabilities of the level above."""
    terms = base.exp()
    whole = terms.sum(1)
    linked = terms[:, [c for c, parent in enumerate(parents) if parent >= 0]].sum(1)
    columns = []
    for child, parent in enumerate(parents):
        if parent < 0:
            columns.append(terms[:, child] / whole)
        else:
            siblings = terms[:, [c for c, other in enumerate(parents) if other == parent]].sum(1)
            columns.append(linked / whole * above[:, parent] * terms[:, child] / siblings)
    return torch.stack(columns, 1).log()


def definition(head: HierarchicalHead, taxonomy: Taxonomy, features, settings, training) -> dict:
    """Logits of every level, written out."""
    logits: dict[str, torch.Tensor] = {}
    above = None
    for level, parents in zip(taxonomy.levels, taxonomy.parents, strict=True):
        own, layer = of_level(settings, level), head.linear[level]
        refined = features @ layer.weight.T
        if layer.bias is not None:
            refined = refined + layer.bias
        if own["kind"] == "path_softmax" and above is None:
            refined = torch.log(refined.exp() / refined.exp().sum(1, keepdim=True))
        elif own["kind"] == "path_softmax":
            among_paths = of_level(settings, above)["kind"] == "path_softmax"
            probabilities = logits[above].exp() if among_paths else logits[above].softmax(1)
            refined = along_the_path(refined, probabilities, parents.tolist())
        elif own["kind"] != "linear" and above is not None:
            refined = with_prior(refined, logits[above], parents.tolist(), own, training)
        above, logits[level] = level, refined
    return logits


def test_every_kind_routing_and_schedule_is_tested():
    configs = typing.get_args(typing.get_args(HeadConfig)[0])
    kinds = {config.model_fields["kind"].default for config in configs}
    assert {settings["kind"] for settings in HEADS} == kinds
    mixed = {own["kind"] for settings in HEADS for own in settings.get("levels", {}).values()}
    assert mixed == kinds - {"mixed"}
    for key in ("routing", "temperature_schedule"):
        field = ConditionalHeadConfig.model_fields[key]
        assert {s.get(key, field.default) for s in HEADS} == set(typing.get_args(field.annotation))


def test_logits_and_gradients_equal_the_definition(head, taxonomy, features, settings, training):
    torch.manual_seed(3)
    ours = head(features)
    torch.manual_seed(3)
    theirs = definition(head, taxonomy, features, settings, training)
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


@in_evaluation
def test_base_logits_take_exact_gradients(head, taxonomy):
    generator = torch.Generator().manual_seed(4)
    base = [
        torch.randn(2, size, generator=generator, dtype=torch.float64, requires_grad=True)
        for size in taxonomy.num_classes
    ]

    def refined(*base):
        torch.manual_seed(3)
        return tuple(head.refine(dict(zip(taxonomy.levels, base, strict=True))).values())

    assert torch.autograd.gradcheck(refined, base)


@in_evaluation
def test_several_backward_passes_give_the_same(head, features):
    """GradNorm goes back through one forward several times."""
    logits = head(features)
    for scores in logits.values():
        first, second = (
            torch.autograd.grad(scores.square().sum(), features, retain_graph=True)[0] for _ in range(2)
        )
        assert torch.equal(first, second)


@in_evaluation
def test_the_level_above_is_not_changed(head, features):
    base = head.base(features)
    before = {level: logits.detach().clone() for level, logits in base.items()}
    head.refine(base)
    assert all(map(torch.equal, before.values(), base.values()))


@in_evaluation
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


@in_evaluation
def test_each_linear_layer_runs_once(head, features):
    calls = []
    for level, linear in head.linear.items():
        linear.register_forward_hook(lambda *_, level=level: calls.append(level))
    head(features)
    assert calls == list(head.levels)


@in_evaluation
def test_rows_do_not_see_one_another_in_evaluation(head, features):
    alone = head(features[2:3])
    together = head(features)
    for level in head.levels:
        torch.testing.assert_close(alone[level][0], together[level][2])


@in_evaluation
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


@in_evaluation
def test_holds_no_more_than_two_numbers_per_class_beside_its_layers(head, taxonomy):
    assert sum(buffer.numel() for buffer in head.buffers()) <= 2 * taxonomy.num_nodes
    assert len(head.state_dict()) == len(list(head.parameters()))


def test_state_dict_round_trip(head, settings, taxonomy, training, features):
    torch.manual_seed(99)
    other = HierarchicalHead(FEATURES, taxonomy, **settings).double().train(training)
    assert not torch.equal(other.base(features)["a"], head.base(features)["a"])
    other.load_state_dict(head.state_dict())
    other.progress = head.progress
    torch.manual_seed(3)
    ours = head(features)
    torch.manual_seed(3)
    assert all(map(torch.equal, ours.values(), other(features).values()))


@pytest.mark.parametrize(
    "settings", [s for s in HEADS if s["kind"] in ("hierarchical_softmax", "conditional")], ids=str
)
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
