"""Names and sizes that MLflow takes; tests/unit/tracking/test_delivery.py shows that it does."""

import itertools
import json
import posixpath
import re
from types import SimpleNamespace

from hypothesis import example, given
from hypothesis import strategies as st

from hiertune.tracking.limits import MOST_BYTES, batches, clean_name, json_size, text


def test_usual_names_stay_as_they_are():
    for name in ("val/accuracy/genus", "model.head.kind", "val/top5_accuracy/Gruppe Ä", "a.b-c_d"):
        assert clean_name(name) == name


def test_refused_names_are_changed_visibly():
    assert re.fullmatch(r"val/a_b_[0-9a-f]{8}", clean_name("val/a+b"))
    assert re.fullmatch(r"val/__[0-9a-f]{8}", clean_name("val/.."))
    assert re.fullmatch(r"a/_/b_[0-9a-f]{8}", clean_name("a//b"))


@given(st.text(min_size=0, max_size=300))
@example("..0")  # to MLflow a way out of its folder
def test_clean_names_obey_mlflows_rules(name):
    clean = clean_name(name)
    assert re.fullmatch(r"[/\w.\- ]+", clean)
    assert posixpath.normpath(clean) == clean
    assert not clean.startswith(("/", ".."))
    assert len(clean) <= 250


@given(st.text(max_size=8), st.text(max_size=8))
def test_different_names_stay_different(one, other):
    assert (clean_name(one) == clean_name(other)) == (one == other)


def test_values_are_written_as_in_yaml_and_cut_visibly():
    values = ["relu", True, None, 0.1, [512, 256], {"a": 1}, "", "Ä"]
    assert [text(value, 20) for value in values] == [
        "relu", "true", "null", "0.1", "[512, 256]", '{"a": 1}', "", "Ä",
    ]  # fmt: skip
    assert text("x" * 20, 20) == "x" * 20
    assert text("x" * 21, 20) == "x" * 19 + "…"


@given(st.lists(st.integers(1, 600_000), max_size=40), st.integers(1, 9))
def test_batches_keep_order_and_limits(sizes, most):
    made = list(batches(sizes, most, lambda size: size))
    assert [size for batch in made for size in batch] == sizes
    assert all(len(batch) <= most and sum(batch) <= MOST_BYTES for batch in made)
    # Greedy: no batch could have taken the first item of the next one.
    for batch, after in itertools.pairwise(made):
        assert len(batch) == most or sum(batch) + after[0] > MOST_BYTES


@given(st.text(max_size=50), st.text(max_size=50))
def test_json_size_is_never_too_small(key, value):
    item = SimpleNamespace(key=key, value=value)
    assert json_size(item) >= len(json.dumps({"key": key, "value": value}))
