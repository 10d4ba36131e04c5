"""Settings of levels, temperatures, and what probabilities along paths add up to."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertune import Taxonomy
from hiertune.models import LevelSettings, Refinement, settings_by_level

TAXONOMY = Taxonomy.from_parents(["a", "b"], [[-1, -1, -1], [0, 0, 1, 2, 2]])


def refinement(taxonomy: Taxonomy, kind="path_softmax", **own) -> Refinement:
    return Refinement(taxonomy, settings_by_level(taxonomy.levels, kind, **own))


def base_logits(taxonomy: Taxonomy, rows: int = 3, seed: int = 0, scale: float = 3.0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        level: scale * torch.randn(rows, size, generator=generator, dtype=torch.float64)
        for level, size in zip(taxonomy.levels, taxonomy.num_classes, strict=True)
    }


# -------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("own", "key", "allowed"),
    [
        ({"kind": "mixed"}, "kind", "linear, hierarchical_softmax, conditional, path_softmax"),
        ({"routing": "top2"}, "routing", "soft, hard, gumbel"),
        ({"temperature_schedule": "step"}, "temperature_schedule", "linear, cosine, exponential"),
        ({"final_temperature": 0.0}, "final_temperature", "a number above 0"),
        ({"final_temperature": math.inf}, "final_temperature", "a number above 0"),
        ({"temperature": -1.0}, "temperature", "a number above 0"),
        ({"floor": 1.0}, "floor", "a number between 0 and 1"),
    ],
)
def test_wrong_settings_name_what_is_allowed(own, key, allowed):
    with pytest.raises(ValueError, match="allowed") as error:
        LevelSettings(**own)
    assert (error.value.key, error.value.allowed) == (key, allowed)


def test_settings_of_every_level():
    names = ("a", "b", "c")
    hard = LevelSettings("conditional", routing="hard", temperature=2.0)
    assert settings_by_level(names) == dict.fromkeys(names, LevelSettings("linear"))
    same = settings_by_level(names, "conditional", routing="hard", temperature=2.0)
    assert same == dict.fromkeys(names, hard)
    own = {"kind": "conditional", "routing": "hard", "temperature": 2.0}
    plain = LevelSettings("hierarchical_softmax")
    assert settings_by_level(names, "mixed", levels={"b": own}) == {"a": plain, "b": hard, "c": plain}
    others = settings_by_level(names, "mixed", levels={"b": own}, default={"kind": "linear", "bias": False})
    assert others == settings_by_level(names, bias=False) | {"b": hard}


def test_a_level_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="'genus'") as error:
        settings_by_level(("a", "b"), "mixed", levels={"genus": {"kind": "linear"}})
    assert (error.value.key, error.value.allowed) == ("levels.genus", "a, b")


# ------------------------------------------------------------------------------------ temperature


@pytest.mark.parametrize(
    ("schedule", "halfway", "quarter"),
    [
        ("linear", 2.5, 3.25),
        ("cosine", 2.5, 1.0 + 3.0 * (1.0 + math.sqrt(0.5)) / 2.0),
        ("exponential", 2.0, 4.0**0.75),
    ],
)
def test_temperature_goes_from_start_to_end(schedule, halfway, quarter):
    own = LevelSettings(temperature=4.0, final_temperature=1.0, temperature_schedule=schedule)
    assert own.temperature_at(0.5) == pytest.approx(halfway)
    assert own.temperature_at(0.25) == pytest.approx(quarter)


@given(
    st.floats(1e-6, 1e6),
    st.floats(1e-6, 1e6),
    st.sampled_from(["linear", "cosine", "exponential"]),
    st.floats(0, 1),
)
def test_temperature_is_exact_at_both_ends_and_between_them_elsewhere(start, end, schedule, progress):
    own = LevelSettings(temperature=start, final_temperature=end, temperature_schedule=schedule)
    assert (own.temperature_at(0.0), own.temperature_at(1.0)) == (start, end)
    low, high = sorted((start, end))
    assert low * (1 - 1e-12) <= own.temperature_at(progress) <= high * (1 + 1e-12)


def test_without_a_final_temperature_it_stays():
    own = LevelSettings(temperature=0.3)
    assert {own.temperature_at(progress) for progress in (0.0, 0.37, 1.0)} == {0.3}


def test_refinement_takes_the_temperature_of_the_progress():
    base = base_logits(TAXONOMY)
    moving = refinement(TAXONOMY, "conditional", temperature=4.0, final_temperature=0.25)
    for progress, temperature in ((0.0, 4.0), (0.5, 1.0), (1.0, 0.25)):
        fixed = refinement(TAXONOMY, "conditional", temperature=temperature)
        assert torch.equal(moving(base, progress)["b"], fixed(base)["b"])
    assert torch.equal(moving(base)["b"], moving(base, 1.0)["b"])


def test_other_settings_can_be_tried_on_the_same_logits():
    """A trained head's base logits under another routing, without its linear layers."""
    base = base_logits(TAXONOMY)
    hard = refinement(TAXONOMY, "conditional", routing="hard").eval()(base)
    winners = torch.nn.functional.one_hot(base["a"].argmax(1), 3)[:, TAXONOMY.parents[1].tolist()]
    torch.testing.assert_close(hard["b"], base["b"] + torch.log(winners.double() + 1e-10), rtol=0, atol=1e-9)
    assert not refinement(TAXONOMY, "linear").refines
    assert not list(refinement(TAXONOMY).parameters())
    assert not refinement(TAXONOMY).state_dict()


# ------------------------------------------------------------------------- probabilities of paths


@st.composite
def forests(draw, orphans: bool) -> Taxonomy:
    sizes = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    parents = [[-1] * sizes[0]]
    for above, size in pairwise(sizes):
        lowest = -1 if orphans else 0
        parents.append(draw(st.lists(st.integers(lowest, above - 1), min_size=size, max_size=size)))
    return Taxonomy.from_parents([f"l{i}" for i in range(len(sizes))], parents)


def among_siblings(base: torch.Tensor, parents: np.ndarray) -> torch.Tensor:
    """Softmax of the base logits within each group of one parent, [B, C]."""
    shares = torch.empty_like(base)
    for parent in set(parents.tolist()):
        columns = np.flatnonzero(parents == parent)
        shares[:, columns] = base[:, columns].softmax(1)
    return shares


@given(forests(orphans=False), st.integers(0, 1000), st.sampled_from([1.0, 30.0]))
@settings(max_examples=40, deadline=None)
def test_a_class_has_the_product_along_its_path(taxonomy, seed, scale):
    base = base_logits(taxonomy, seed=seed, scale=scale)
    logits = refinement(taxonomy)(base)
    shares = [
        among_siblings(base[level], parents)
        for level, parents in zip(taxonomy.levels, taxonomy.parents, strict=True)
    ]
    for position, level in enumerate(taxonomy.levels):
        for index, path in enumerate(taxonomy.ancestors(level).tolist()):
            product = math.prod(shares[above][:, c] for above, c in enumerate(path))
            torch.testing.assert_close(logits[level][:, index].exp(), product, rtol=1e-9, atol=1e-300)
        childless = position and set(taxonomy.parents[position].tolist()) < set(
            range(taxonomy.num_classes[position - 1])
        )
        total = logits[level].exp().sum(1)
        assert (total <= 1 + 1e-12).all()
        if not childless and position < 2:
            torch.testing.assert_close(total, torch.ones_like(total))


@given(forests(orphans=True), st.integers(0, 1000), st.sampled_from([1.0, 30.0]))
@settings(max_examples=40, deadline=None)
def test_children_share_what_orphans_leave_of_their_parent(taxonomy, seed, scale):
    base = base_logits(taxonomy, seed=seed, scale=scale)
    probabilities = {level: logits.exp() for level, logits in refinement(taxonomy)(base).items()}
    for position, (above, level) in enumerate(pairwise(taxonomy.levels), start=1):
        parents = taxonomy.parents[position]
        orphans = np.flatnonzero(parents < 0)
        flat = base[level].softmax(1)
        torch.testing.assert_close(probabilities[level][:, orphans], flat[:, orphans])
        left = flat[:, np.flatnonzero(parents >= 0)].sum(1)
        for parent in set(parents.tolist()) - {-1}:
            of_children = probabilities[level][:, np.flatnonzero(parents == parent)].sum(1)
            torch.testing.assert_close(
                of_children, left * probabilities[above][:, parent], atol=1e-300, rtol=1e-9
            )


def test_where_every_class_has_a_child_each_level_sums_to_one():
    parents = [[-1, -1], [1, 0, 1, -1], [3, 0, 2, -1, 1, 3, -1]]
    taxonomy = Taxonomy.from_parents(["a", "b", "c"], parents)
    for logits in refinement(taxonomy)(base_logits(taxonomy)).values():
        torch.testing.assert_close(logits.exp().sum(1), torch.ones(3, dtype=torch.float64))


def test_what_childless_classes_keep_is_missing_below():
    taxonomy = Taxonomy.from_parents(["a", "b"], [[-1, -1, -1], [2, 0, 0]])
    logits = refinement(taxonomy)(base_logits(taxonomy))
    a, b = logits["a"].exp(), logits["b"].exp()
    torch.testing.assert_close(b.sum(1), 1 - a[:, 1])
    given_one_below = torch.stack([a[:, 2], b[:, 1], b[:, 2]], 1) / (1 - a[:, 1:2])
    torch.testing.assert_close(logits["b"].softmax(1), given_one_below)


def test_what_all_siblings_have_in_common_changes_nothing():
    """Neither logits nor gradients, however far families are from one another."""
    base = base_logits(TAXONOMY)
    weights = torch.linspace(-1, 1, 15, dtype=torch.float64).view(3, 5)
    results = []
    for distance in (0.0, 10.0, 1000.0):
        shift = distance * torch.tensor([-1.0, 0.0, 1.0])[TAXONOMY.parents[1].tolist()]
        moved = (base["b"] + shift).requires_grad_()
        logits = refinement(TAXONOMY)({"a": base["a"], "b": moved})["b"]
        results.append((logits, *torch.autograd.grad((logits * weights).sum(), moved)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["path_softmax", "conditional"])
def test_huge_logits_stay_finite(kind, dtype):
    taxonomy = Taxonomy.from_parents(["a", "b", "c"], [[-1, -1], [1, 0, 1, -1], [3, 0, 2, -1, 1, 3, 0, 0]])
    generator = torch.Generator().manual_seed(0)
    base = {
        level: (1e4 * (2 * torch.randint(0, 2, (40, size), generator=generator) - 1))
        .to(dtype)
        .requires_grad_()
        for level, size in zip(taxonomy.levels, taxonomy.num_classes, strict=True)
    }
    logits = refinement(taxonomy, kind)(base)
    loss = sum(scores.log_softmax(1)[:, 0].sum() for scores in logits.values())
    gradients = torch.autograd.grad(loss, list(base.values()))
    assert all(tensor.isfinite().all() for tensor in (*logits.values(), *gradients))
    exact = refinement(taxonomy, kind)({level: scores.detach().double() for level, scores in base.items()})
    for level, scores in logits.items():
        assert scores.dtype == torch.float32
        torch.testing.assert_close(
            scores.double(), exact[level], rtol=1e-6, atol=2e-3
        )  # 1e4 * 2**-24 a few times


def test_no_rows_no_logits():
    base = base_logits(TAXONOMY, rows=0)
    assert refinement(TAXONOMY)(base)["b"].shape == (0, 5)
