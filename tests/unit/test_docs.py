"""The tables in docs/linnaeus.md name keys, metrics and tests that exist."""

import ast
import re
from pathlib import Path

import pytest

from hiertune._schema import plain_schema
from hiertune.check import objective_metrics
from hiertune.linnaeus.keys import find_key, is_section

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "linnaeus.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith("| Linnaeus |")
]


def quoted(cell):
    return re.findall(r"`([^`]+)`", cell)


def alternatives(schema):
    """A schema and all that it may stand for: references and unions followed."""
    if "$ref" in schema:
        return alternatives(plain_schema()["$defs"][schema["$ref"].rpartition("/")[2]])
    options = [option for word in ("oneOf", "anyOf") for option in schema.get(word, [])]
    return [schema, *(found for option in options for found in alternatives(option))]


def inside(schemas, name):
    """What the key `name` of any of `schemas` may hold."""
    if name.startswith("<"):
        inner = [schema["additionalProperties"] for schema in schemas if schema.get("additionalProperties")]
    else:
        inner = [schema["properties"][name] for schema in schemas if name in schema.get("properties", {})]
    return [found for schema in inner for found in alternatives(schema)]


def schemas_at(key):
    schemas = [plain_schema()]
    for name in key.split("."):
        schemas = inside(schemas, name)
    return schemas


def allows(schema, value):
    return value == schema.get("const") or value in schema.get("enum", [])


def key_exists(text):
    """Whether `key`, or `key: value` with one of the values that it may have, is in the schema."""
    key, _, value = text.partition(": ")
    schemas = schemas_at(key)
    return bool(schemas) and (not value or any(allows(schema, value) for schema in schemas))


def test_the_page_has_tables():
    assert len(ROWS) > 50
    assert all(len(row) == 4 for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_every_key_and_metric_exists(row):
    assert quoted(row[1]) or row[1] == "—"
    for text in quoted(row[1]):
        if "/" in text:
            assert text in objective_metrics(("<level>",))
        else:
            assert key_exists(text), text


@pytest.mark.parametrize("text", ["loss.gamma", "weighting.kind: gradnrm", "loss.levels.<level>.gamma", "x"])
def test_what_is_no_key_is_noticed(text):
    assert not key_exists(text)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_every_test_exists(row):
    tests = quoted(row[3])
    assert tests
    for test in tests:
        name, _, function = test.partition("::")
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert not function or function in functions


def test_every_full_key_of_linnaeus_is_one_that_the_import_knows():
    for row in ROWS:
        for text in quoted(row[0]):
            key = text.partition(":")[0].replace("<task>", "taxa_L10")
            if re.match(
                r"(DATA|MODEL|LOSS|TRAIN|SCHEDULE|AUG|OPTIMIZER|LR_SCHEDULER|MISC|DISTRIBUTED)\b", key
            ):
                assert find_key(key) or is_section(key) or key == "TRAIN", key
