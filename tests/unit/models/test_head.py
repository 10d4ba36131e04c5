"""The head's arguments and what they change; `tests/contract/test_heads.py` holds the formula."""

from __future__ import annotations

import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch

from hiertune import Taxonomy
from hiertune.models import HierarchicalHead

TAXONOMY = Taxonomy.from_parents(["a", "b"], [[-1, -1, -1], [0, 0, 1, 2, 2]])


def make(kind="conditional", training=True, **settings) -> HierarchicalHead:
    torch.manual_seed(0)
    return HierarchicalHead(4, TAXONOMY, kind, **settings).train(training)


def features(rows: int = 6) -> torch.Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(1))


def prior(head: HierarchicalHead, rows: int = 6) -> torch.Tensor:
    """Probability of each parent as the children saw it, `[B, parents]`."""
    z = features(rows)
    difference = (head(z)["b"] - head(z, refine=False)["b"]).detach()
    return difference.exp()[:, [0, 2, 3]]


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"kind": "softmax"}, "linear, hierarchical_softmax, conditional, path_softmax, mixed"),
        ({"routing": "top2"}, "soft, hard, gumbel"),
        ({"temperature": 0.0}, "above 0"),
        ({"temperature": -1.0}, "above 0"),
        ({"temperature": float("nan")}, "above 0"),
        ({"temperature": float("inf")}, "above 0"),
        ({"floor": 0.0}, "between 0 and 1"),
        ({"floor": 1.0}, "between 0 and 1"),
    ],
)
def test_wrong_settings_name_what_is_allowed(settings, allowed):
    with pytest.raises(ValueError, match=allowed) as error:
        HierarchicalHead(4, TAXONOMY, **settings)
    assert str(error.value).startswith(next(iter(settings)))


@pytest.mark.parametrize(
    "levels", [("type", "train"), ("a.b", "linear"), ("forward", "parents_1"), ("0", "weight"), ("1", "0")]
)
def test_any_level_name_finds_its_layer(levels):
    taxonomy = Taxonomy.from_parents(levels, [[-1, -1], [0, 1, 1]])
    head = HierarchicalHead(4, taxonomy, "hierarchical_softmax")
    assert [head.linear[level].out_features for level in levels] == [2, 3]
    assert list(head.linear) == list(head.linear.keys()) == list(levels)
    assert len(head.linear) == 2
    assert list(head(features())) == list(levels)
    assert len(list(head.parameters())) == 4
    with pytest.raises(KeyError):
        head.linear["no such level"]


def test_bias_can_be_left_out():
    assert make(bias=False).linear["a"].bias is None
    assert make(bias=True).linear["a"].bias.shape == (3,)


@pytest.mark.parametrize("routing", ["soft", "hard"])
def test_temperature_flattens_the_parents_distribution(routing):
    sharp, plain, flat = (prior(make(routing=routing, temperature=t)) for t in (0.1, 1.0, 50.0))
    for p in (sharp, plain, flat):
        torch.testing.assert_close(p.sum(1), torch.ones(6))
    assert (sharp.amax(1) > plain.amax(1)).all()
    assert (plain.amax(1) > flat.amax(1)).all()
    torch.testing.assert_close(flat, torch.full_like(flat, 1 / 3), rtol=0, atol=0.03)


def test_hard_routing_takes_the_argmax_in_evaluation_only():
    base = make()(features())["a"]
    for temperature in (0.1, 1.0, 50.0):
        head = make(routing="hard", temperature=temperature, training=False)
        expected = torch.nn.functional.one_hot(base.argmax(1), 3).float()
        torch.testing.assert_close(prior(head), expected, rtol=0, atol=1e-9)
        assert torch.equal(prior(head.train()), prior(make(routing="soft", temperature=temperature)))


def test_gumbel_routing_samples_in_training_only():
    head = make(routing="gumbel", temperature=0.5)
    torch.manual_seed(7)
    first, second = prior(head), prior(head)
    torch.manual_seed(7)
    again = prior(head)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    torch.testing.assert_close(first.sum(1), torch.ones(6))
    soft = make(routing="soft", temperature=0.5, training=False)
    assert torch.equal(prior(head.eval()), prior(soft))


def test_gumbel_argmax_follows_the_softmax():
    """The Gumbel-max trick: the winner is a sample of the softmax, at any temperature."""
    head = make(routing="gumbel", temperature=5.0)
    z = features(1).expand(40_000, 4)
    torch.manual_seed(0)
    winners = (head(z)["b"] - head(z, refine=False)["b"])[:, [0, 2, 3]].argmax(1)
    shares = torch.bincount(winners, minlength=3) / len(winners)
    expected = head(z[:1], refine=False)["a"].softmax(1)[0]
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.015)  # 6 standard deviations


@pytest.mark.parametrize("kind", ["linear", "hierarchical_softmax"])
def test_routing_and_temperature_mean_nothing_to_other_kinds(kind):
    plain, other = make(kind), make(kind, routing="gumbel", temperature=9.0)
    assert all(map(torch.equal, plain(features()).values(), other(features()).values()))


def test_a_raised_floor_changes_the_logits_as_the_formula_says():
    for floor in (1e-10, 0.5):
        head = make("hierarchical_softmax", floor=floor).double()
        z = features().double()
        base = head(z, refine=False)
        parents = base["a"].softmax(1)[:, TAXONOMY.parents[1].tolist()]
        torch.testing.assert_close(head(z)["b"], base["b"] + torch.log(parents + floor), rtol=0, atol=1e-12)


def test_refinement_uses_the_refined_parent():
    taxonomy = Taxonomy.from_parents(["a", "b", "c"], [[-1, -1], [0, 1], [0, 1]])
    head = HierarchicalHead(1, taxonomy, "hierarchical_softmax")
    with torch.no_grad():
        for linear in head.linear.layers:
            linear.weight.zero_()
            linear.bias.zero_()
        head.linear["a"].bias.copy_(torch.tensor([2.0, -2.0]))  # the others have no opinion of their own
    logits = head(torch.ones(1, 1))
    share = torch.tensor([[2.0, -2.0]]).softmax(1)
    torch.testing.assert_close(logits["b"].softmax(1), share)
    torch.testing.assert_close(logits["c"].softmax(1), share)


@pytest.mark.parametrize("kind", ["hierarchical_softmax", "path_softmax"])
def test_a_hundred_thousand_leaves(kind):
    random = np.random.default_rng(0)
    sizes = (300, 3000, 20_000, 100_000)
    parents = [np.full(300, -1), *(random.integers(-1, a, b) for a, b in pairwise(sizes))]
    head = HierarchicalHead(2, Taxonomy.from_parents(list("abcd"), parents), kind)
    logits = head(torch.randn(3, 2))
    sum(scores.logsumexp(1).sum() for scores in logits.values()).backward()
    assert logits["d"].shape == (3, 100_000)
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_refines_only_if_some_level_does():
    assert not make("linear").refines
    assert not make("mixed", default={"kind": "linear"}, levels={}).refines
    assert make("mixed", default={"kind": "linear"}, levels={"b": {"kind": "path_softmax"}}).refines


def test_a_level_that_the_taxonomy_lacks_is_refused():
    with pytest.raises(ValueError, match="'genus'") as error:
        make("mixed", levels={"genus": {"kind": "linear"}})
    assert str(error.value) == "levels.genus: there is no level 'genus'\n  allowed: a, b"


def test_bias_of_single_levels():
    head = make("mixed", default={"kind": "linear", "bias": False}, levels={"b": {"kind": "path_softmax"}})
    assert head.linear["a"].bias is None
    assert head.linear["b"].bias.shape == (5,)


def test_temperatures_follow_the_progress():
    head = make(temperature=4.0, final_temperature=1.0)
    assert head.temperatures == {"a": 1.0, "b": 1.0}  # as after training
    trained = head(features())["b"]
    head.progress = 0.5
    assert head.temperatures == {"a": 2.0, "b": 2.0}
    assert head.settings["b"].temperature == 4.0
    assert torch.equal(head(features())["b"], make(temperature=2.0)(features())["b"])
    head.progress = 1.0
    assert torch.equal(head(features())["b"], trained)
    assert make("path_softmax").temperatures == {}


def test_pickles():
    head = make("hierarchical_softmax")
    copy = pickle.loads(pickle.dumps(head))
    assert all(map(torch.equal, head(features()).values(), copy(features()).values()))


def test_says_what_it_is():
    assert "kind=hierarchical_softmax" in repr(make("hierarchical_softmax"))
    assert "kind=conditional, routing=hard, temperature=2.0" in repr(make(routing="hard", temperature=2.0))
    mixed = make("mixed", levels={"b": {"kind": "path_softmax"}})
    assert "kind=mixed, levels={a: hierarchical_softmax, b: path_softmax}" in repr(mixed)
