"""The taxonomy against its definitions, restated by walking up the tree one link at a time."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertune import Taxonomy
from hiertune.errors import InputError

LEVELS = ("order", "family", "genus")
ROWS = [
    ("B", "f1", "x"),
    ("B", "f1", "y"),
    ("A", "f1", "x"),  # another family f1, another genus x
    ("A", None, "z"),  # an orphan genus of a known order
    ("B", "", "z"),  # another one of that name
    (None, "f2", "w"),  # an orphan family
    ("A", "f3", None),
    (None, None, "z"),
]


@pytest.fixture
def animals() -> Taxonomy:
    return Taxonomy.from_lineages(ROWS, LEVELS)


@pytest.fixture
def forest() -> Taxonomy:
    """Two trees, an orphan at each lower level, a top class without children.

    top 0: mid 0, 1; top 1: mid 3; mid 2 is an orphan; leaf: mid 0: 0, 1; mid 1: 2; mid 2: 3, 4; mid 3: 5;
    leaf 6 is an orphan
    """
    return Taxonomy.from_parents(
        ["top", "mid", "leaf"], [[-1, -1, -1], [0, 0, -1, 1], [0, 0, 1, 2, 2, 3, -1]]
    )


# ---------------------------------------------------------------------------------- from_lineages


def test_classes_are_paths_in_the_order_of_paths(animals):
    assert animals.num_classes == (2, 4, 7)
    assert [animals.path("family", i) for i in range(4)] == [
        (None, "f2"),
        ("A", "f1"),
        ("A", "f3"),
        ("B", "f1"),
    ]
    assert [animals.path("genus", i) for i in range(7)] == [
        (None, None, "z"),
        (None, "f2", "w"),
        ("A", None, "z"),
        ("A", "f1", "x"),
        ("B", None, "z"),
        ("B", "f1", "x"),
        ("B", "f1", "y"),
    ]
    assert animals.names[2] == ("z", "w", "z", "x", "z", "x", "y")


def test_parents_link_only_to_the_level_just_above(animals):
    assert animals.parents[0].tolist() == [-1, -1]
    assert animals.parents[1].tolist() == [-1, 0, 0, 1]
    assert animals.parents[2].tolist() == [-1, 0, -1, 1, -1, 3, 3]


def test_encode_gives_the_labels_of_rows(animals):
    assert animals.encode(ROWS).tolist() == [
        [1, 3, 5],
        [1, 3, 6],
        [0, 1, 3],
        [0, -1, 2],
        [1, -1, 4],
        [-1, 0, 1],
        [0, 2, -1],
        [-1, -1, 0],
    ]
    animals.check_labels(animals.encode(ROWS))


@pytest.mark.parametrize(
    ("row", "level", "shown"),
    [
        (("C", None, None), "order", "'C'"),
        (("A", "f1", "y"), "genus", "'A; f1; y'"),  # a known name in another family
        (("A", "f3", "z"), "genus", "'A; f3; z'"),  # the orphan z is not the z of f3
        ((None, "f1", None), "family", "'?; f1'"),
        (("B", None, "x"), "genus", "'B; ?; x'"),
    ],
)
def test_encode_refuses_an_unknown_path(animals, row, level, shown):
    with pytest.raises(InputError, match="row 1") as error:
        animals.encode([ROWS[0], row])
    assert error.value.key == level
    assert shown in str(error.value)


def test_find_takes_a_name_or_a_path(animals):
    for level in animals.levels:
        for index in range(animals.num_classes[animals.level_index(level)]):
            path = animals.path(level, index)
            for unknown, between in (("", ";"), ("?", "; ")):
                text = between.join(name or unknown for name in path)
                assert animals.find(level, text) == index
    assert animals.path("genus", animals.find("genus", "y")) == ("B", "f1", "y")
    odd = Taxonomy.from_lineages([("a;b",), ("c ",)], ["level"])
    assert [odd.find("level", name) for name in ("a;b", "c ")] == [0, 1]


@pytest.mark.parametrize(
    ("level", "text", "message"),
    [
        (
            "genus",
            "z",
            "3 classes of level 'genus' are named 'z': give the path of one\n"
            "  allowed: '?; ?; z', 'A; ?; z', 'B; ?; z'",
        ),
        (
            "family",
            "C;f1",
            "no class of level 'family' has the path 'C; f1'\n  allowed: 'A; f1', 'B; f1'",
        ),
        ("family", "F3", "no class of level 'family' is named 'F3'"),
        ("family", "A;f33", "no class of level 'family' is named 'A;f33' (did you mean 'f3'?)"),
        ("genus", "f3", "no class of level 'genus' is named 'f3'"),
        ("genus", "", "no class of level 'genus' is named ''"),
        ("species", "z", "there is no level 'species'\n  allowed: order, family, genus"),
    ],
)
def test_find_says_what_there_is(animals, level, text, message):
    with pytest.raises(InputError) as caught:
        animals.find(level, text)
    assert str(caught.value) == message


def test_find_lists_ten_paths_at_most():
    taxonomy = Taxonomy.from_lineages([(f"a{i:02}", "x") for i in range(12)], ["a", "b"])
    with pytest.raises(InputError, match=r"12 classes [^$]*'a00; x', .* 'a09; x', \.\.\.$") as caught:
        taxonomy.find("b", "x")
    assert "a10" not in str(caught.value)


def test_encode_of_no_rows(animals):
    assert animals.encode([]).shape == (0, 3)


names = st.one_of(st.none(), st.sampled_from(["a", "b", "c", "Ä", "a b/c"]))


@st.composite
def lineages(draw):
    depth = draw(st.integers(1, 4))
    rows = draw(st.lists(st.tuples(*[names] * depth), min_size=1, max_size=20))
    rows.append(("a",) * depth)  # so that no level is empty
    return rows, [f"level {i}" for i in range(depth)]


@given(lineages(), st.randoms())
@settings(deadline=None)
def test_lineages_in_any_order_give_the_same_taxonomy_and_their_own_labels(case, random):
    rows, levels = case
    taxonomy = Taxonomy.from_lineages(rows, levels)
    shuffled = random.sample(rows, len(rows))
    assert Taxonomy.from_lineages(shuffled, levels) == taxonomy

    labels = taxonomy.encode(shuffled)
    taxonomy.check_labels(labels)
    for row, label in zip(shuffled, labels.tolist(), strict=True):
        for level, (name, index) in enumerate(zip(row, label, strict=True)):
            assert (index < 0) == (name is None)
            if name is not None:
                assert taxonomy.path(level, index) == row[: level + 1]
    paths = [{row[: level + 1] for row in rows if row[level]} for level in range(len(levels))]
    assert taxonomy.num_classes == tuple(map(len, paths))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "level 'order' is empty"),
        ([("A", "f", "g"), ("A", "f")], "lineage 1"),
        ([("A", "f", "g"), "abc"], "lineage 1"),
        ([("A", "f", 3)], "lineage 0 has 3 at level 'genus'"),
        ([("A", float("nan"), "g")], "level 'family'"),
        ([("A", None, "g"), ("B", "", "g")], "level 'family' is empty"),
    ],
)
def test_bad_lineages(rows, message):
    with pytest.raises(InputError, match=message):
        Taxonomy.from_lineages(rows, LEVELS)


# ----------------------------------------------------------------------------------- from_parents


def test_sizes_and_default_names(forest):
    assert forest.num_classes == (3, 4, 7)
    assert (forest.num_levels, forest.num_leaves, forest.num_nodes) == (3, 7, 14)
    assert forest.names[1] == ("mid_0", "mid_1", "mid_2", "mid_3")
    assert forest.path("leaf", 4) == (None, "mid_2", "leaf_4")
    assert repr(forest) == "Taxonomy(top: 3, mid: 4, leaf: 7)"


@pytest.mark.parametrize(
    ("levels", "parents", "message"),
    [
        ([], [], "at least one level"),
        (["a", ""], [[-1], [0]], "'' cannot be the name"),
        (["a", "b/c"], [[-1], [0]], "'b/c' cannot be the name"),
        (["a", " b"], [[-1], [0]], "' b' cannot be the name"),
        (["a", "a"], [[-1], [0]], "'a' is named twice"),
        (["a", "b"], [[-1]], "given for 1 levels, but there are 2"),
        (["a", "b"], [[-1], []], "level 'b' is empty"),
        (["a", "b"], [[-1], [0.0]], "parents of level 'b' are float64"),
        (["a", "b"], [[-1], [True]], "parents of level 'b' are bool"),
        (["a", "b"], [[-1], [[0]]], r"of shape \(1, 1\)"),
        (["a", "b"], [[-1, 0], [0]], r"class 'a_1' \(1\) of level 'a' has parent 0"),
        (["a", "b"], [[-1, -1], [0, 1, 2]], r"class 'b_2' \(2\) of level 'b' has parent 2"),
        (["a", "b"], [[-1, -1], [0, -2]], r"class 'b_1' \(1\) of level 'b' has parent -2"),
    ],
)
def test_bad_parents(levels, parents, message):
    with pytest.raises(InputError, match=message):
        Taxonomy.from_parents(levels, parents)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([["x"], ["y", "z"]], "'b' has 3 classes but 2 names"),
        ([["x"], ["y", "", "z"]], "class 1 of level 'b' is named ''"),
        ([["x"], ["y", 1, "z"]], "class 1 of level 'b' is named 1"),
        ([["x"], ["y", "z", "y"]], r"class 'y' \(2\) of level 'b' has the same path as class 0"),
    ],
)
def test_bad_names(names, message):
    with pytest.raises(InputError, match=message):
        Taxonomy.from_parents(["a", "b"], [[-1], [0, 0, 0]], names)


@pytest.mark.parametrize(
    ("anchors", "message"),
    [
        ([[-1], [-1, -1], [0, 2, -1]], "class 'c_1' .* has anchor 2"),
        ([[-1], [0, -1], [-1, -1, -1]], "class 'b_0' .* has anchor 0"),
        ([[-1], [-1, -1], [-1, -1, 0]], "class 'c_2' .* contradicting parents"),
        ([[-1], [-1, -1], [-1]], "3 classes but 1 anchors"),
    ],
)
def test_bad_anchors(anchors, message):
    with pytest.raises(InputError, match=message):
        Taxonomy.from_parents(["a", "b", "c"], [[-1], [0, 0], [-1, -1, 1]], anchors=anchors)


def test_arrays_are_frozen_copies(forest):
    given = np.array([0, 0, 1])
    taxonomy = Taxonomy.from_parents(["a", "b"], [[-1, -1], given])
    given[0] = 1
    assert taxonomy.parents[1].tolist() == [0, 0, 1]
    for array in (*forest.parents, *forest.anchors, forest.ancestors("leaf")):
        assert array.dtype == np.int64
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0


# -------------------------------------------------------------------------------------- structure


def walk(taxonomy: Taxonomy, level: int, index: int) -> dict[int, int]:
    """Level -> class, of the class and all that it is linked to above."""
    chain = {}
    while index >= 0:
        chain[level] = index
        index = taxonomy.parents[level][index]
        level -= 1
    return chain


def edges(taxonomy: Taxonomy, level: int, a: int, b: int) -> float:
    """Steps up from `a` and down to `b`."""
    of_a, of_b = walk(taxonomy, level, a), walk(taxonomy, level, b)
    shared = [k for k in of_a if of_a[k] == of_b.get(k)]
    return 2.0 * (level - max(shared)) if shared else math.inf


@st.composite
def forests(draw):
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    parents = [[-1] * sizes[0]]
    for above, size in pairwise(sizes):
        parents.append(draw(st.lists(st.integers(-1, above - 1), min_size=size, max_size=size)))
    return Taxonomy.from_parents([f"l{i}" for i in range(len(sizes))], parents)


@given(forests())
@settings(max_examples=60, deadline=None)
def test_structure_equals_a_walk_up_the_tree(taxonomy):
    for level, size in enumerate(taxonomy.num_classes):
        chains = [walk(taxonomy, level, i) for i in range(size)]
        assert taxonomy.ancestors(level).tolist() == [
            [chain.get(k, -1) for k in range(level + 1)] for chain in chains
        ]
        every = np.arange(size)
        expected = np.array([[edges(taxonomy, level, a, b) for b in every] for a in every])
        np.testing.assert_array_equal(taxonomy.distance_matrix(level), expected)
        np.testing.assert_array_equal(taxonomy.distances(level, every[:, None], every), expected)
        lca = np.where(np.isinf(expected), -1, level - expected / 2)
        np.testing.assert_array_equal(taxonomy.lca_levels(level, every[:, None], every), lca)
        np.testing.assert_array_equal(
            taxonomy.class_distances(level, every[:, None], every, "depth"), level - lca
        )
        height = np.where(lca < 0, max(map(len, chains)), level - lca)
        np.testing.assert_array_equal(
            taxonomy.class_distances(level, every[:, None], every, "height"), height
        )


def test_distances_by_hand(forest):
    assert forest.distances("leaf", [0, 0, 0, 0, 3, 6], [0, 1, 2, 5, 4, 0]).tolist() == [
        0.0,
        2.0,
        4.0,
        math.inf,
        2.0,
        math.inf,
    ]
    assert forest.distance_matrix("top").tolist() == [
        [0, math.inf, math.inf],
        [math.inf, 0, math.inf],
        [math.inf, math.inf, 0],
    ]
    assert forest.class_distances("leaf", 0, [0, 1, 2, 3]).tolist() == [0, 1, 2, 3]
    pairs = Taxonomy.from_parents(["a", "b"], [[-1], [-1, -1]])  # each leaf hangs alone from the root
    assert pairs.class_distances("b", 0, 1, "depth") == 2
    assert pairs.class_distances("b", 0, 1, "height") == 1


@pytest.mark.parametrize("index", [7, -1, 0.5, [0, 9]])
def test_indices_must_be_classes(forest, index):
    with pytest.raises(InputError, match="not classes of level 'leaf'"):
        forest.distances("leaf", 0, index)


def test_class_distance_form_must_be_known(forest):
    with pytest.raises(InputError, match="depth, height"):
        forest.class_distances("leaf", 0, 1, "width")


def test_level_index(forest):
    assert [forest.level_index(level) for level in ("top", "leaf", 1, -1)] == [0, 2, 1, 2]
    for level in ("species", 3, -4):
        with pytest.raises(InputError, match="top, mid, leaf"):
            forest.level_index(level)


# ----------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    "row", [(0, 0, 1), (-1, -1, -1), (-1, 0, 0), (0, -1, 2), (-1, 2, 4), (2, -1, -1), (0, -1, 6), (0, 0, -1)]
)
def test_labels_that_agree_with_the_tree(forest, row):
    forest.check_labels([row])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((0, 0, 7), "row 1 has label 7"),
        ((0, -2, 0), "row 1 has label -2"),
        ((1, 0, 0), "'top_1' at level 'top', but its class at level 'mid' is 'top_0; mid_0'"),
        ((0, 1, 0), "'top_0; mid_1' at level 'mid', but its class at level 'leaf' is 'top_0; mid_0; leaf_0'"),
        ((1, -1, 0), "'top_1' at level 'top', but its class at level 'leaf' is"),  # across an unknown label
        ((0, 2, 3), "'top_0' at level 'top', but its class at level 'mid' is"),  # an orphan has no parent
        ((0, 0, 6), "'leaf' is '[?]; [?]; leaf_6'"),
    ],
)
def test_labels_that_contradict_the_tree(forest, row, message):
    with pytest.raises(InputError, match=message):
        forest.check_labels(np.array([(0, 0, 0), row, row]))


def test_labels_that_contradict_what_is_known_above_a_gap(animals):
    animals.check_labels([[0, -1, 2]])
    with pytest.raises(InputError, match=r"row 0 is labelled 'B' .* is 'A; [?]; z'"):
        animals.check_labels([[1, -1, 2]])


@pytest.mark.parametrize("labels", [[0, 0, 0], [[0, 0]], [[0.0, 0.0, 0.0]]])
def test_labels_must_be_integers_of_all_levels(forest, labels):
    with pytest.raises(InputError, match=r"integers of shape \[rows, 3\]"):
        forest.check_labels(labels)


# ------------------------------------------------------------------------------- equality, storage


def test_equal_by_content(forest, animals):
    again = Taxonomy.from_parents(forest.levels, forest.parents)
    assert again == forest
    assert hash(again) == hash(forest)
    assert forest != animals
    assert forest != "forest"
    other_parents = [forest.parents[0], forest.parents[1], [0, 0, 1, 2, 2, 3, 3]]
    assert Taxonomy.from_parents(forest.levels, other_parents) != forest
    other_names = [forest.names[0], forest.names[1], [*forest.names[2][:-1], "last"]]
    assert Taxonomy.from_parents(forest.levels, forest.parents, other_names) != forest
    other_anchors = [forest.anchors[0], forest.anchors[1], [-1] * 6 + [0]]
    assert Taxonomy.from_parents(forest.levels, forest.parents, forest.names, other_anchors) != forest
    assert Taxonomy.from_parents(["top", "mid", "low"], forest.parents, forest.names) != forest


def test_survives_storage(animals, tmp_path):
    animals.save(tmp_path / "tree.json")
    stored = json.loads(json.dumps(animals.to_dict()))
    from_arrays = Taxonomy.from_parents(animals.levels, animals.parents, animals.names, animals.anchors)
    for again in (
        Taxonomy.load(tmp_path / "tree.json"),
        Taxonomy.from_dict(stored),
        pickle.loads(pickle.dumps(animals)),
        from_arrays,
    ):
        assert again == animals
        assert again.encode(ROWS).tolist() == animals.encode(ROWS).tolist()
        assert not again.parents[2].flags.writeable


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "hdf5"}, "not a taxonomy"),
        ({"version": 2}, "version 2 is not known"),
        ({"names": None}, "must be lists"),
        ({"parents": [1]}, "one list per level"),
        ({"parents": [[5]]}, r"class 'x' \(0\) of level 'a' has parent 5"),
        ({"parents": [["-1"]]}, "parents of level 'a' are"),
        ({"levels": [1]}, "1 cannot be the name of a level"),
    ],
)
def test_a_bad_file_is_named(tmp_path, change, message):
    content = Taxonomy.from_parents(["a"], [[-1]], [["x"]]).to_dict()
    path = tmp_path / "tree.json"
    path.write_text(json.dumps(content | change))
    with pytest.raises(InputError, match=message) as error:
        Taxonomy.load(path)
    assert error.value.file == str(path)


@pytest.mark.parametrize(("text", "message"), [("[", "cannot be read"), ("[]", "not a taxonomy")])
def test_a_file_that_is_something_else(tmp_path, text, message):
    (tmp_path / "tree.json").write_text(text)
    with pytest.raises(InputError, match=message):
        Taxonomy.load(tmp_path / "tree.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.json"):
        Taxonomy.load(tmp_path / "none.json")


def test_importing_the_package_does_not_load_torch():
    code = "import sys, hiertune; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "caf\udce9"])
def test_names_that_no_file_can_keep_are_refused(name):
    with pytest.raises(InputError) as error:
        Taxonomy.from_lineages([("a", "b"), ("a", name)], ["top", "low"])
    place = sorted(["b", name]).index(name)
    assert str(error.value).splitlines() == [
        f"class {place} of level 'low' is named {name!r}",
        "  allowed: text in UTF-8, without NUL, not empty",
    ]
