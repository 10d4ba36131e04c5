"""Where the mass of a class goes, by hand and against the definition of each relation."""

from __future__ import annotations

import math

import pytest
from rich.console import Console

from hiertune import Taxonomy
from hiertune.losses import TaxonomySmoothing, target_row
from hiertune.losses.target_row import Receiver, Relation

TAXONOMY = Taxonomy.from_lineages(
    [
        ("B", "o1", "f1", "x"),
        ("B", "o1", "f1", "y"),
        ("B", "o1", "f2", "z"),
        ("B", "o1", "f2", "[w]"),  # rich would take the brackets for markup
        ("B", "o2", "f3", "u"),
        ("A", "o3", "f4", "v"),
        ("A", "o3", "f4", "x"),
        (None, None, "f5", "s"),  # a family of unknown order, with two genera
        (None, None, "f5", "t"),
        ("B", None, None, "q"),  # a genus of unknown family
    ],
    ("domain", "order", "family", "genus"),
)


def row(path: str, alpha=0.2, beta=0.5, clade_share=0.8, level="genus", most=20):
    loss = TaxonomySmoothing(TAXONOMY, level, alpha, beta, clade_share=clade_share)
    return target_row(loss, TAXONOMY, level, TAXONOMY.find(level, path), most)


def test_relations_from_the_class_to_unrelated_ones():
    # from B;o1;f1;x: y is 2 edges away, z and [w] 4, u 6; the other five share nothing that is linked
    near, mid, far = math.exp(-1), math.exp(-2), math.exp(-3)
    unit = 0.2 * 0.8 / (near + 2 * mid + far)
    found = row("B;o1;f1;x")
    assert found.level == "genus"
    assert found.path == ("B", "o1", "f1", "x")
    assert found.relations == (
        Relation("itself", "x", 1, 0.8),
        Relation("same family", "f1", 1, pytest.approx(near * unit)),
        Relation("same order", "o1", 2, pytest.approx(mid * unit)),
        Relation("same domain", "B", 1, pytest.approx(far * unit)),
        Relation("unrelated", None, 5, pytest.approx(0.2 * 0.2 / 5)),
    )
    assert [relation.together for relation in found.relations[2:]] == pytest.approx(
        [2 * mid * unit, far * unit, 0.04]
    )


def test_the_classes_that_get_most():
    near, mid, far = math.exp(-1), math.exp(-2), math.exp(-3)
    unit = 0.2 * 0.8 / (near + 2 * mid + far)
    found = row("B;o1;f1;x", most=5)
    first = TAXONOMY.names[3][min(set(range(10)) - related_to_x())]
    assert found.receivers == (
        Receiver("y", "same family", pytest.approx(near * unit)),
        Receiver("[w]", "same order", pytest.approx(mid * unit)),  # of equals, the first class first
        Receiver("z", "same order", pytest.approx(mid * unit)),
        Receiver("u", "same domain", pytest.approx(far * unit)),
        Receiver(first, "unrelated", pytest.approx(0.008)),
    )
    assert found.others == 4
    everything = row("B;o1;f1;x", most=100)
    assert len(everything.receivers) == 9
    assert everything.others == 0
    assert everything.receivers[:5] == found.receivers


def related_to_x() -> set[int]:
    return {TAXONOMY.find("genus", name) for name in ("B;o1;f1;x", "y", "z", "[w]", "u")}


def test_unknown_ranks_are_left_out():
    found = row("s", alpha=0.5, clade_share=0.9)
    assert found.path == (None, None, "f5", "s")
    assert found.relations == (
        Relation("itself", "s", 1, 0.5),
        Relation("same family", "f5", 1, pytest.approx(0.45)),
        Relation("unrelated", None, 8, pytest.approx(0.05 / 8)),
    )
    # known across a gap is no link: nothing is related, so all others get the same
    orphan = row("q", alpha=0.5)
    assert orphan.relations == (
        Relation("itself", "q", 1, 0.5),
        Relation("unrelated", None, 9, pytest.approx(0.5 / 9)),
    )


def test_masses_of_every_class_add_up():
    for level, names in zip(TAXONOMY.levels, TAXONOMY.names, strict=True):
        for share in (1.0, 0.3):
            loss = TaxonomySmoothing(TAXONOMY, level, 0.4, 2.0, clade_share=share)
            for index in range(len(names)):
                found = target_row(loss, TAXONOMY, level, index)
                assert sum(relation.classes for relation in found.relations) == len(names)
                assert sum(relation.together for relation in found.relations) == pytest.approx(1.0)
                expected = sorted(loss.target_matrix()[index].tolist(), reverse=True)
                received = [receiver.mass for receiver in found.receivers]
                assert sorted([0.6, *received], reverse=True) == expected[: len(received) + 1]


def test_relations_without_classes_are_shown_as_such():
    found = row("f3", level="family", clade_share=1.0)  # alone in its order
    assert found.relations[1] == Relation("same order", "o2", 0, 0.0)
    assert found.relations[2] == Relation("same domain", "B", 2, pytest.approx(0.1))
    assert found.relations[3] == Relation("unrelated", None, 2, 0.0)
    assert [receiver.name for receiver in found.receivers] == ["f1", "f2"]
    assert found.others == 0


def shown(row) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(row)
    return console.export_text()


def test_rich_shows_both_tables():
    text = shown(row("B;o1;f1;x", beta=0.0, most=3))
    lines = [line.split() for line in text.splitlines()]
    assert text.startswith("genus: B; o1; f1; x\n")
    assert ["itself", "x", "1", "0.8", "0.8"] in lines
    assert ["same", "order", "o1", "2", "0.04", "0.08"] in lines
    assert ["unrelated", "5", "0.008", "0.04"] in lines
    # all relatives get the same: the first classes in the order of paths
    assert [line for line in lines if "0.04" in line and line[0] in ("y", "z", "[w]", "u")] == [
        ["y", "same", "family", "0.04"],
        ["[w]", "same", "order", "0.04"],
        ["z", "same", "order", "0.04"],
    ]
    assert lines[-1] == ["and", "6", "more"]
    assert "?; ?; f5; s" in shown(row("s"))


def test_rich_says_when_nothing_leaves_the_class():
    text = shown(row("u", alpha=0.0))
    assert "no other class gets any mass" in text
    assert "more" not in text
