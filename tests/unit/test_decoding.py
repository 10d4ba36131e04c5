"""Decoding rules against their definitions: dense risk, the head's own refinement, metrics of labels."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertune import Taxonomy, decoding
from hiertune.config import (
    ConditionalHeadConfig,
    HierarchicalSoftmaxConfig,
    LinearHeadConfig,
    MixedHeadConfig,
    PathSoftmaxConfig,
)
from hiertune.decoding import (
    AS_TRAINED,
    CRM,
    Decoder,
    DecodingRule,
    SharedRanks,
    Tried,
    ValidationLogits,
    best_of,
    logits_bytes,
    refinement,
    rules_for,
    try_rules,
)
from hiertune.errors import InputError
from hiertune.metrics import prediction_metrics, seen_classes
from hiertune.models import HierarchicalHead

FOREST = Taxonomy.from_parents(
    ["a", "b", "c"], [[-1, -1], [0, 1, 1, -1], [0, 0, 1, 2, 3, 3, -1, -1]]
)  # orphans at both lower levels


def random_logits(taxonomy, rows=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = zip(taxonomy.levels, taxonomy.num_classes, strict=True)
    return {level: 2 * torch.randn(rows, size, generator=generator) for level, size in sizes}


def no_refinement(base):
    return dict(base)


# ---------------------------------------------------------------------------------------- the risk


@st.composite
def forests(draw):
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    parents = [[-1] * sizes[0]]
    for above, size in pairwise(sizes):
        parents.append(draw(st.lists(st.integers(-1, above - 1), min_size=size, max_size=size)))
    return Taxonomy.from_parents([f"l{i}" for i in range(len(sizes))], parents)


@settings(max_examples=60, deadline=None)
@given(taxonomy=forests(), seed=st.integers(0, 2**16), scale=st.sampled_from([0.1, 1.0, 5.0]))
def test_ranks_not_shared_are_the_dense_conditional_risk(taxonomy, seed, scale):
    logits = scale * torch.randn(
        6, taxonomy.num_leaves, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    probabilities = logits.softmax(1)
    classes = np.arange(taxonomy.num_leaves)
    distances = torch.from_numpy(taxonomy.class_distances(-1, classes[:, None], classes))
    risk = probabilities @ distances.T  # risk[n, k] = sum_j D(k, j) p_n(j)
    shared = SharedRanks(taxonomy)(probabilities)
    torch.testing.assert_close(taxonomy.num_levels - shared, risk, rtol=0, atol=1e-12)

    base = {
        level: torch.zeros(6, size, dtype=torch.float64)
        for level, size in zip(taxonomy.levels, taxonomy.num_classes, strict=True)
    } | {taxonomy.levels[-1]: logits}
    named = Decoder(taxonomy, CRM, no_refinement)(base)
    of_named = risk.gather(1, named[:, -1:]).squeeze(1)
    torch.testing.assert_close(of_named, risk.amin(1), rtol=0, atol=1e-12)


FAMILIES = Taxonomy.from_parents(["family", "genus"], [[-1, -1], [0, 1, 1, 1]])
P = torch.tensor([[0.38, 0.22, 0.2, 0.2]], dtype=torch.float64)
LOGITS = {"family": torch.tensor([[1.0, 0.0]], dtype=torch.float64), "genus": P.log()}


def test_a_family_of_likely_genera_beats_the_single_likeliest_genus():
    torch.testing.assert_close(SharedRanks(FAMILIES)(P), torch.tensor([[0.76, 0.84, 0.82, 0.82]]).double())
    assert Decoder(FAMILIES, AS_TRAINED, no_refinement)(LOGITS).tolist() == [[0, 0]]
    assert Decoder(FAMILIES, CRM, no_refinement)(LOGITS).tolist() == [[1, 1]]


def test_temperature_sharpens_the_probabilities_of_the_risk():
    """At 1/2 they are squared: 0.1444, 0.0484, 0.04, 0.04 over 0.2728, and the single genus wins."""
    sharp = DecodingRule(kind="crm", temperature=0.5)
    assert Decoder(FAMILIES, sharp, no_refinement)(LOGITS).tolist() == [[0, 0]]


def test_above_an_orphan_each_level_names_by_itself():
    base = {level: torch.zeros(1, size) for level, size in zip("abc", FOREST.num_classes, strict=True)}
    base["a"][0, 1] = base["b"][0, 2] = 1.0
    base["c"][0, 7] = 9.0
    assert Decoder(FOREST, CRM, no_refinement)(base).tolist() == [[1, 2, 7]]
    base["c"][0, 4] = 99.0  # its parent is an orphan
    assert Decoder(FOREST, CRM, no_refinement)(base).tolist() == [[1, 3, 4]]


# --------------------------------------------------------------------------------------- the heads


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (LinearHeadConfig(), {"kind": "linear"}),
        (HierarchicalSoftmaxConfig(floor=0.01), {"kind": "hierarchical_softmax", "floor": 0.01}),
        (ConditionalHeadConfig(temperature=3.0), {"kind": "conditional", "temperature": 3.0}),
        (
            ConditionalHeadConfig(temperature=3.0, final_temperature=0.5),
            {"kind": "conditional", "temperature": 0.5},
        ),
        (ConditionalHeadConfig(routing="hard"), {"kind": "conditional", "routing": "hard"}),
    ],
)
@pytest.mark.parametrize("rule", [AS_TRAINED, CRM], ids=str)
def test_a_head_refines_the_base_logits_anew(config, settings, rule):
    base = random_logits(FOREST)
    expected = HierarchicalHead(5, FOREST, **settings).eval().refine(base)
    for level, logits in refinement(config, FOREST)(base).items():
        assert torch.equal(logits, expected[level])
    anew = rule.model_copy(update={"head": config})
    by_head = Decoder(FOREST, rule, lambda _: expected)(base)
    assert torch.equal(Decoder(FOREST, anew, no_refinement)(base), by_head)


def test_argmax_is_that_of_each_level():
    base = random_logits(FOREST)
    expected = torch.stack([base[level].argmax(1) for level in FOREST.levels], 1)
    assert torch.equal(Decoder(FOREST, AS_TRAINED, no_refinement)(base), expected)


def test_a_refinement_leaves_the_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    refinement(HierarchicalSoftmaxConfig(), FOREST)
    assert torch.equal(torch.rand(3), expected)


# --------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize(
    ("head", "heads"),
    [
        (LinearHeadConfig(bias=False), 6),
        (HierarchicalSoftmaxConfig(), 6),
        (HierarchicalSoftmaxConfig(floor=0.1), 7),
        (ConditionalHeadConfig(temperature=1.7), 7),
        (PathSoftmaxConfig(), 6),
        (MixedHeadConfig(levels={}), 7),
    ],
)
def test_every_rule_is_tried_once_and_as_trained_first(head, heads):
    rules = rules_for(head)
    assert rules[0] == AS_TRAINED
    assert len(rules) == len(set(map(str, rules))) == 5 * heads
    assert not any(rule.head == head.model_copy(update={"bias": True}) for rule in rules)


@pytest.mark.parametrize("rule", rules_for(ConditionalHeadConfig()), ids=str)
def test_a_rule_survives_storage(rule):
    assert DecodingRule.model_validate_json(rule.model_dump_json()) == rule
    assert DecodingRule.model_validate(rule.model_dump(mode="json")) == rule


def test_a_rule_reads_as_words():
    soft = ConditionalHeadConfig(temperature=0.5)
    hard = ConditionalHeadConfig(routing="hard", temperature=3.0)
    assert str(AS_TRAINED) == "as trained"
    assert str(CRM) == "conditional risk"
    assert str(DecodingRule(head=HierarchicalSoftmaxConfig())) == "argmax, hierarchical softmax head"
    assert (
        str(DecodingRule(kind="crm", temperature=2.0, head=soft))
        == "conditional risk at T=2, soft routing at T=0.5"
    )
    assert str(DecodingRule(head=hard)) == "argmax, hard routing"


# -------------------------------------------------------------------------------------- choosing


def validation_logits(rows=40):
    random = np.random.default_rng(1)
    labels = FOREST.ancestors("c")[random.integers(0, 8, rows)].copy()
    labels[random.random(labels.shape) < 0.2] = -1
    train_labels = FOREST.ancestors("c")[[0, 1, 3, 6]]
    seen = tuple(seen_classes(train_labels, FOREST))
    return ValidationLogits(random_logits(FOREST, rows), torch.from_numpy(labels), seen), train_labels


@pytest.mark.parametrize("block", [1, 80, 2**23])
def test_the_metrics_of_a_rule_are_those_of_the_labels_it_gives(monkeypatch, block):
    monkeypatch.setattr(decoding, "_BLOCK_ELEMENTS", block)  # rows of the forest: 1, 10, all
    logits, train_labels = validation_logits()
    head = ConditionalHeadConfig(temperature=1.5)
    tried = try_rules(logits, FOREST, head)
    assert [each.rule for each in tried] == rules_for(head)
    trained = refinement(head, FOREST)
    for each in tried:
        labels = Decoder(FOREST, each.rule, trained)(logits.base)
        assert each.metrics == prediction_metrics(labels, logits.labels, FOREST, train_labels, "val")
    assert len({tuple(each.metrics.values()) for each in tried}) > 3, "the rules differ"


def tried_with(*values):
    rules = rules_for(LinearHeadConfig())
    return [Tried(rule, {"val/accuracy/c": value}) for rule, value in zip(rules, values, strict=False)]


@pytest.mark.parametrize(
    ("values", "mode", "best"),
    [
        ((0.5, 0.7, 0.6), "max", 1),
        ((0.5, 0.7, 0.4), "min", 2),
        ((0.7, 0.7, 0.7), "max", 0),
        ((0.4, 0.7, 0.4), "min", 0),
    ],
)
def test_the_best_rule_and_of_equals_the_first(values, mode, best):
    tried = tried_with(*values)
    assert best_of(tried, "val/accuracy/c", mode) is tried[best]


def test_a_loss_is_not_decided_by_names():
    with pytest.raises(InputError, match=r"(?s)'val/loss' is not decided by .*allowed: val/accuracy/c"):
        best_of(tried_with(0.5), "val/loss", "min")


# ---------------------------------------------------------------------------------------- storage


def test_validation_logits_survive_storage(tmp_path):
    taxonomy = Taxonomy.from_parents(["__metadata__", "labels"], [[-1, -1], [0, 1, -1]])
    seen = (torch.tensor([True, False]), torch.tensor([True, False, True]))
    logits = ValidationLogits(random_logits(taxonomy, 5), torch.tensor([[0, 1]] * 5), seen)
    path = tmp_path / "new" / "val_logits.safetensors"
    logits.save(path)
    found = ValidationLogits.load(path, taxonomy)
    assert list(found.base) == ["__metadata__", "labels"]
    for level in found.base:
        assert torch.equal(found.base[level], logits.base[level])
    assert torch.equal(found.labels, logits.labels)
    assert all(map(torch.equal, found.seen, seen))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_validation_logits_that_are_not_there_damaged_or_of_something_else(tmp_path):
    path = tmp_path / "val_logits.safetensors"
    with pytest.raises(InputError, match=r"val_logits.safetensors: can't be read as validation logits"):
        ValidationLogits.load(path, FOREST)
    validation_logits()[0].save(path)
    other = Taxonomy.from_parents(["a", "b", "c"], [[-1], [0], [0, 0]])
    with pytest.raises(InputError, match="holds validation logits of another taxonomy"):
        ValidationLogits.load(path, other)
    with pytest.raises(InputError, match="can't be read as validation logits"):
        ValidationLogits.load(path, FAMILIES)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match="can't be read as validation logits"):
        ValidationLogits.load(path, FOREST)


def test_the_bytes_of_logits():
    assert logits_bytes(10, FOREST) == 10 * (2 + 4 + 8) * 4
