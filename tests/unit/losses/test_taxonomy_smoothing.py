"""Taxonomy smoothing against its definition: a dense matrix from pairwise distances, one pair at a time."""

from __future__ import annotations

import math
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertune import Taxonomy
from hiertune.errors import InputError
from hiertune.losses import TaxonomySmoothing, taxonomy_smoothing

EXACT = {"rtol": 0, "atol": 1e-6}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def distance(taxonomy: Taxonomy, level: int, a: int, b: int) -> float:
    """Edges from `a` up to the first class that is also above `b`, and down again."""
    steps = 0
    while a >= 0 and b >= 0:
        if a == b:
            return 2.0 * steps
        a, b = taxonomy.parents[level - steps][a], taxonomy.parents[level - steps][b]
        steps += 1
    return math.inf


def definition(
    taxonomy, level, alpha, beta, uniform_roots=True, fallback_to_uniform=True, clade_share=1.0
) -> torch.Tensor:
    level = taxonomy.level_index(level)
    size = taxonomy.num_classes[level]
    rows = torch.eye(size, dtype=torch.float64)
    has_parent = [parent >= 0 for parent in taxonomy.parents[level]]
    if size == 1 or not (any(has_parent) or fallback_to_uniform):
        return rows
    for i in range(size):
        far = {j: distance(taxonomy, level, i, j) for j in range(size) if j != i}
        strangers = [j for j, d in far.items() if d == math.inf]
        far = {j: d for j, d in far.items() if d < math.inf}
        if not far or (uniform_roots and not has_parent[i]):
            strangers, far = [], dict.fromkeys((j for j in range(size) if j != i), 0.0)
        nearest = min(far.values())  # a common factor of all weights: exp(-beta * nearest) may be zero
        weight = {j: math.exp(-beta * (d - nearest)) for j, d in far.items()}
        share = clade_share if strangers else 1.0
        rows[i, i] = 1 - alpha
        for j, w in weight.items():
            rows[i, j] = share * alpha * w / sum(weight.values())
        for j in strangers:
            rows[i, j] = (1 - share) * alpha / len(strangers)
    return rows


def balanced() -> Taxonomy:
    """Leaves 0 1 | 2 || 3 4 5, unsorted parents in the middle."""
    return Taxonomy.from_parents(
        ["top", "mid", "leaf"],
        [[-1, -1], [1, 0, 0], [2, 2, 1, 0, 0, 0]],
        [["a", "b"], list("cde"), list("fghijk")],
    )


def forest() -> Taxonomy:
    """Orphans in the middle (2) and at the leaves (6); a middle class of one leaf; a top class of none."""
    return Taxonomy.from_parents(
        ["top", "mid", "leaf"], [[-1, -1, -1], [0, 0, -1, 1], [0, 0, 1, 2, 2, 3, -1]]
    )


def unary() -> Taxonomy:
    """One class per upper level."""
    return Taxonomy.from_parents(["top", "mid", "leaf"], [[-1], [0], [0, 0, 0]])


def all_orphans() -> Taxonomy:
    return Taxonomy.from_parents(["top", "leaf"], [[-1, -1], [-1, -1, -1]])


def deep() -> Taxonomy:
    """The nearest relatives of leaf 0 are four levels up (d = 8); leaves 1 and 2 are siblings."""
    return Taxonomy.from_parents(
        ["a", "b", "c", "d", "e"], [[-1, -1], [0, 0, 1], [0, 1, 2], [0, 1, 2], [0, 1, 1, 2]]
    )


TREES = [balanced, forest, unary, all_orphans, deep]


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("uniform_roots", [True, False])
@pytest.mark.parametrize("fallback_to_uniform", [True, False])
@pytest.mark.parametrize("clade_share", [1.0, 0.7, 0.0])
@pytest.mark.parametrize(
    ("alpha", "beta"), [(0.1, 1.0), (0.0, 1.0), (1.0, 0.3), (0.4, 0.0), (0.3, 7.0), (0.3, 60.0)]
)
def test_target_matrix_is_the_definition(tree, alpha, beta, uniform_roots, fallback_to_uniform, clade_share):
    taxonomy = tree()
    for level in taxonomy.levels:
        settings = (level, alpha, beta, uniform_roots, fallback_to_uniform, clade_share)
        loss = TaxonomySmoothing(taxonomy, *settings)
        expected = definition(taxonomy, *settings)
        torch.testing.assert_close(loss.target_matrix(), expected, rtol=0, atol=1e-12)


def test_target_matrix_by_hand():
    near, far = math.exp(-0.5 * 2), math.exp(-0.5 * 4)
    rows = TaxonomySmoothing(balanced(), "leaf", alpha=0.3, beta=0.5).target_matrix().tolist()
    assert rows[0] == pytest.approx([0.7, 0.3 * near / (near + far), 0.3 * far / (near + far), 0, 0, 0])
    assert rows[2] == pytest.approx([0.15, 0.15, 0.7, 0, 0, 0])  # no sibling: its two cousins share
    assert rows[3] == pytest.approx([0, 0, 0, 0.7, 0.15, 0.15])
    assert rows[0][3:] == [0, 0, 0]  # another tree gets exactly nothing
    top = TaxonomySmoothing(balanced(), "top", alpha=0.3).target_matrix().tolist()
    assert top == [[0.7, 0.3], [0.3, 0.7]]
    assert TaxonomySmoothing(unary(), "mid", alpha=0.3).target_matrix().tolist() == [[1.0]]
    orphan = TaxonomySmoothing(forest(), "leaf", alpha=0.3).target_matrix()[6].tolist()
    assert orphan == pytest.approx([0.05] * 6 + [0.7])


def test_clade_share_by_hand():
    rows = (
        TaxonomySmoothing(balanced(), "leaf", alpha=0.3, beta=0.0, clade_share=0.8).target_matrix().tolist()
    )
    assert rows[0] == pytest.approx([0.7, 0.12, 0.12, 0.02, 0.02, 0.02])
    assert rows[5] == pytest.approx([0.02, 0.02, 0.02, 0.12, 0.12, 0.7])
    # leaves 3 and 4 are a clade headed by an orphan, 5 is alone under its top class, 6 is an orphan itself
    rows = TaxonomySmoothing(forest(), "leaf", alpha=0.3, beta=9.0, clade_share=0.5).target_matrix().tolist()
    assert rows[3] == pytest.approx([0.03, 0.03, 0.03, 0.7, 0.15, 0.03, 0.03])
    assert rows[5] == pytest.approx([0.05] * 5 + [0.7, 0.05])
    assert rows[6] == pytest.approx([0.05] * 6 + [0.7])
    one_clade = TaxonomySmoothing(unary(), "leaf", alpha=0.3, clade_share=0.5).target_matrix().tolist()
    assert one_clade[0] == pytest.approx([0.7, 0.15, 0.15])
    top = TaxonomySmoothing(balanced(), "top", alpha=0.3, clade_share=0.5).target_matrix().tolist()
    assert top == [[0.7, 0.3], [0.3, 0.7]]


@pytest.mark.parametrize("beta", [5.0, 12.0, 100.0, 1e6, 1e300])
def test_sharp_beta_keeps_to_the_nearest_relatives(beta):
    sharp = TaxonomySmoothing(balanced(), "leaf", alpha=0.2, beta=beta).target_matrix()
    assert sharp[0].tolist() == pytest.approx([0.8, 0.2, 0, 0, 0, 0], abs=1e-4)
    distant = TaxonomySmoothing(deep(), "e", alpha=0.2, beta=beta).target_matrix()
    assert distant[0].tolist() == pytest.approx([0.8, 0.1, 0.1, 0.0])
    assert distant[1].tolist() == pytest.approx([0.0, 0.8, 0.2, 0.0], abs=1e-4)
    assert distant[3].tolist() == pytest.approx([0.2 / 3, 0.2 / 3, 0.2 / 3, 0.8])  # no relative at all


@st.composite
def forests(draw):
    sizes = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    parents = [[-1] * sizes[0]]
    for above, size in pairwise(sizes):
        parents.append(draw(st.lists(st.integers(-1, above - 1), min_size=size, max_size=size)))
    return Taxonomy.from_parents([f"l{i}" for i in range(len(sizes))], parents)


@given(
    forests(),
    st.floats(0, 1),
    st.floats(0, 50),
    st.booleans(),
    st.booleans(),
    st.just(1.0) | st.floats(0, 1),
    st.integers(0, 2**31 - 1),
)
@settings(max_examples=60, deadline=None)
def test_values_and_gradients_equal_the_dense_definition(
    taxonomy, alpha, beta, roots, fallback, clade_share, seed
):
    generator = torch.Generator().manual_seed(seed)
    for level, size in enumerate(taxonomy.num_classes):
        loss = TaxonomySmoothing(taxonomy, level, alpha, beta, roots, fallback, clade_share)
        rows = definition(taxonomy, level, alpha, beta, roots, fallback, clade_share)
        torch.testing.assert_close(loss.target_matrix(), rows, rtol=0, atol=1e-12)
        torch.testing.assert_close(rows.sum(1), torch.ones(size, dtype=torch.float64))

        logits = 5 * torch.randn(6, size, generator=generator, dtype=torch.float64)
        upstream = torch.randn(6, generator=generator, dtype=torch.float64)
        classes = torch.randint(size, (6,), generator=generator)
        mixtures = torch.rand(6, size, generator=generator, dtype=torch.float64) + 1e-3
        mixtures /= mixtures.sum(1, keepdim=True)
        for targets, target_rows in ((classes, rows[classes]), (mixtures, mixtures @ rows)):
            ours, dense = logits.clone().requires_grad_(), logits.clone().requires_grad_()
            value = loss(ours, targets)
            expected = -(target_rows * torch.log_softmax(dense, 1)).sum(1)
            torch.testing.assert_close(value, expected, **EXACT)
            value.backward(upstream)
            expected.backward(upstream)
            torch.testing.assert_close(ours.grad, dense.grad, **EXACT)


@pytest.fixture(params=["table", "compact"])
def form(request, monkeypatch):
    """Both ways to make rows, as chosen by the number of classes."""
    if request.param == "compact":
        monkeypatch.setattr(taxonomy_smoothing, "DENSE_CLASSES", 0)
    return request.param


@pytest.mark.parametrize("chunk_elements", [1, 20, 2**18])
def test_float32_with_and_without_table_in_chunks_of_any_size(form, chunk_elements, monkeypatch):
    monkeypatch.setattr(taxonomy_smoothing, "CHUNK_ELEMENTS", chunk_elements)
    loss = TaxonomySmoothing(forest(), "leaf", alpha=0.3, beta=0.7, clade_share=0.9)
    assert (loss.table is None) == (form == "compact")
    logits = torch.randn(9, 7, generator=torch.Generator().manual_seed(1), requires_grad=True)
    targets = torch.tensor([0, 6, 3, 3, 5, 1, 2, 4, 6])
    value = loss(logits, targets)
    rows = definition(forest(), "leaf", 0.3, 0.7, clade_share=0.9)[targets]
    expected = -(rows * torch.log_softmax(logits.detach().double(), 1)).sum(1)
    torch.testing.assert_close(value, expected.float(), rtol=1e-6, atol=1e-6)
    value.sum().backward()
    torch.testing.assert_close(logits.grad, (torch.softmax(logits, 1) - rows).float(), **EXACT)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("clade_share", [1.0, 0.6])
def test_gradcheck(form, soft, clade_share):
    loss = TaxonomySmoothing(forest(), "leaf", alpha=0.3, beta=0.7, clade_share=clade_share)
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(4, 7).softmax(1) if soft else torch.tensor([0, 6, 3, 5])
    assert torch.autograd.gradcheck(lambda z: loss(z, targets.double() if soft else targets), logits)


def test_no_half_precision_inside_autocast(form):
    """Under autocast a product of rows and log-probabilities would run in bfloat16."""
    loss = TaxonomySmoothing(balanced(), "leaf", alpha=0.3)
    logits = 3 * torch.randn(32, 6, requires_grad=True)
    classes = torch.arange(32) % 6
    for targets in (classes, torch.eye(6)[classes]):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(logits, targets)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, loss(logits, targets), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient, torch.autograd.grad(loss(logits, targets).sum(), logits)[0])


def test_a_large_level_holds_no_matrix():
    sizes = (30, 300, 3000)
    generator = np.random.default_rng(0)
    parents = [np.full(30, -1)] + [generator.integers(0, above, size) for above, size in pairwise(sizes)]
    taxonomy = Taxonomy.from_parents(["a", "b", "c"], parents)
    loss = TaxonomySmoothing(taxonomy, "c")
    # per class 3 ancestors of 4 bytes, 4 values of 8, 1 link of 4; links of the 301 nodes above
    assert loss.state_bytes() == 3000 * (3 * 4 + 4 * 8 + 4) + 301 * 4
    small = TaxonomySmoothing(taxonomy, "b")
    assert small.state_bytes() == 300 * (2 * 4 + 3 * 8 + 4) + 4 * 300 * 300


def test_nothing_is_saved_and_everything_moves():
    loss = TaxonomySmoothing(forest(), "leaf")
    assert loss.state_dict() == {}
    assert {name for name, _ in loss.named_buffers()} == {"ancestors", "weights", "links", "table"}
    again = pickle.loads(pickle.dumps(loss))
    torch.testing.assert_close(again.target_matrix(), loss.target_matrix())
    assert {buffer.device.type for buffer in loss.to("meta").buffers()} == {"meta"}


@pytest.mark.parametrize("arguments", [{"alpha": -0.1}, {"alpha": 1.1}, {"alpha": math.nan}])
def test_alpha_out_of_range(arguments):
    with pytest.raises(InputError, match="0 <= alpha <= 1"):
        TaxonomySmoothing(balanced(), "leaf", **arguments)


@pytest.mark.parametrize("beta", [-1.0, math.inf, math.nan])
def test_beta_out_of_range(beta):
    with pytest.raises(InputError, match="finite number >= 0"):
        TaxonomySmoothing(balanced(), "leaf", beta=beta)


@pytest.mark.parametrize("clade_share", [-0.1, 1.1, math.nan])
def test_clade_share_out_of_range(clade_share):
    with pytest.raises(InputError, match="0 <= clade_share <= 1"):
        TaxonomySmoothing(balanced(), "leaf", clade_share=clade_share)


def test_wrong_width_and_unknown_level():
    with pytest.raises(ValueError, match=r"\(2, 5\), but must be \[rows, 6\]"):
        TaxonomySmoothing(balanced(), "leaf")(torch.zeros(2, 5), torch.tensor([0, 1]))
    with pytest.raises(InputError, match="top, mid, leaf"):
        TaxonomySmoothing(balanced(), "species")
