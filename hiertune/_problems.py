"""Many things wrong at once, as one InputError; and pydantic's findings in the words of the file."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hiertune._distributions import FORMS, Range
from hiertune._schema import plain_schema
from hiertune._yaml import Key, show, shown_key
from hiertune.errors import InputError

SHOWN = 10
"""Problems listed in one message."""


@dataclass(frozen=True)
class Origin:
    """Where a resolved value comes from: its line, and the range it was taken from, if any."""

    line: int
    source: Range | None = None


Origins = Mapping[Key, Origin]


def origin_of(origins: Origins, key: Key) -> Origin | None:
    """The origin of a key or, for one that is not written down, of what encloses it."""
    for end in range(len(key), -1, -1):
        if key[:end] in origins:
            return origins[key[:end]]
    return None


class InputErrors(InputError):
    """Several problems of one file: the first in full, the others in a line each."""

    def __init__(self, errors: tuple[InputError, ...]) -> None:
        self.errors = errors
        first = errors[0]
        super().__init__(
            first.problem, file=first.file, line=first.line, key=first.key, allowed=first.allowed
        )

    def __reduce__(self):
        return InputErrors, (self.errors,)

    def __str__(self) -> str:
        lines = [InputError.__str__(self)]
        lines += [str(error).replace("\n  allowed: ", "; allowed: ") for error in self.errors[1:SHOWN]]
        if len(self.errors) > SHOWN:
            lines.append(f"and {len(self.errors) - SHOWN} more")
        return "\n".join(lines)


class Problems:
    """Collects what is wrong with one file, each thing once."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self._found: dict[tuple, InputError] = {}

    def add(self, problem: str, *, line: int | None, key: Key, allowed: str | None = None) -> None:
        text = shown_key(key)
        error = InputError(problem, file=self.file, line=line, key=text, allowed=allowed)
        self._found.setdefault((line, text, problem), error)

    def add_validation(self, error: ValidationError, origins: Origins) -> None:
        """Everything that pydantic found in a resolved tree whose values come from `origins`."""
        for detail in error.errors(include_url=False):
            key, problem, allowed = explain(detail, origins)
            origin = origin_of(origins, key)
            self.add(problem, line=origin.line if origin else None, key=key, allowed=allowed)

    def raise_any(self) -> None:
        """Raise InputError if anything was added: by line, `SHOWN` at most in words."""
        errors = sorted(self._found.values(), key=lambda error: error.line or 0)
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise InputErrors(tuple(errors))


# ------------------------------------------------------------------------------------- wording


def nearest(name: object, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing when no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=1) if isinstance(name, str) else []
    return f" (did you mean '{close[0]}'?)" if close else ""


def _distribution_hint(value: Any) -> str:
    """For a mapping that looks like a distribution gone wrong: `{unifrom: [0, 1]}`, `{uniform: 1}`."""
    if not isinstance(value, dict) or len(value) != 1:
        return ""
    ((name, inner),) = value.items()
    if name in FORMS:
        return f": it takes a list, {FORMS[name]}, got {show(inner)}"
    return nearest(name, FORMS)


def explain(detail: Any, origins: Origins) -> tuple[Key, str, str | None]:
    """Key, problem and what is allowed, of one entry of `ValidationError.errors()`."""
    key, schema, parent = _locate(detail["loc"])
    kind, value = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        known = list(parent.get("properties", {}))
        also = list(FORMS) if isinstance(value, list) else []
        return key, f"unknown key{nearest(key[-1], known + also)}", _join(known)
    if kind == "missing":
        if isinstance(key[-1], int):
            return key[:-1], "has too few entries", describe(parent)
        return key, "is required, but missing", describe(schema)
    if kind == "union_tag_not_found" and not (hint := _distribution_hint(value)):
        return (*key, "kind"), "is required, but missing", _join(_kinds(schema))
    if kind == "union_tag_invalid":
        tag = value["kind"]
        return (
            (*key, "kind"),
            f"unknown kind {show(tag)}{nearest(tag, _kinds(schema))}",
            _join(_kinds(schema)),
        )
    if kind == "value_error":
        text = str(detail["ctx"]["error"])
        return key, text if isinstance(value, dict | list) else f"{show(value)}: {text}", None
    origin = origin_of(origins, key)
    if origin and origin.source:
        hint = " (did you mean 'int'?)" if kind == "int_type" else ""
        return key, f"{origin.source} gives values that are not allowed{hint}", describe(schema)
    if kind == "literal_error":
        return key, f"got {show(value)}{nearest(value, schema['enum'])}", describe(schema)
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"):
        return key, f"{show(value)} is out of range", describe(schema)
    text = "the text " if isinstance(value, str) else ""
    return key, f"got {text}{show(value)}{_distribution_hint(value)}", describe(schema)


def _locate(loc: tuple[str | int, ...]) -> tuple[tuple[str | int, ...], dict, dict]:
    """Key of a pydantic location (without union tags), its schema, and its parent's."""
    root = plain_schema()
    key: list[str | int] = []
    schema = parent = root
    for part in loc:
        if "discriminator" in schema:
            schema = _target(schema["discriminator"]["mapping"][part])
            continue
        key.append(part)
        parent, schema = schema, _child(schema, part)
        if "$ref" in schema:
            schema = _target(schema["$ref"])
    return tuple(key), schema, parent


def _target(reference: str) -> dict:
    return plain_schema()["$defs"][reference.rpartition("/")[2]]


def _child(schema: dict, part: str | int) -> dict:
    if isinstance(part, int):
        return schema["prefixItems"][part] if "prefixItems" in schema else schema["items"]
    if part in schema.get("properties", {}):
        return schema["properties"][part]
    return schema.get("additionalProperties") or {}


def _kinds(schema: dict) -> list[str]:
    """The kinds of a union, in the order in which the union names them."""
    return [_target(option["$ref"])["properties"]["kind"]["const"] for option in schema["oneOf"]]


def _join(names: Iterable[str]) -> str:
    return ", ".join(names)


def describe(schema: dict) -> str:
    """What a JSON Schema allows, in words."""
    if "$ref" in schema:
        return describe(_target(schema["$ref"]))
    if "anyOf" in schema:
        return " or ".join(describe(option) for option in schema["anyOf"])
    if "enum" in schema:
        return _join(schema["enum"])
    if "discriminator" in schema:
        return f"a mapping of kind {_join(_kinds(schema))}"
    match schema["type"]:
        case "object" if "properties" in schema:
            return f"a mapping with the keys {_join(schema['properties'])}"
        case "object":
            return f"a mapping from names, each to {describe(schema['additionalProperties'])}"
        case "array" if "prefixItems" in schema:
            return f"a list of {len(schema['prefixItems'])}, each {describe(schema['prefixItems'][0])}"
        case "array":
            return f"a list of one or more, each {describe(schema['items'])}"
        case "integer":
            return f"a whole number{_bounds(schema)}"
        case "number":
            return f"a number{_bounds(schema)}"
    return {"string": "text", "boolean": "true or false", "null": "null"}[schema["type"]]


def _bounds(schema: dict) -> str:
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    parts = []
    if "exclusiveMinimum" in schema:
        parts.append(f"above {schema['exclusiveMinimum']:g}")
    if low > -math.inf:
        parts.append(f"of at least {low:g}")
    if high < math.inf:
        parts.append(f"at most {high:g}")
    if "exclusiveMaximum" in schema:
        parts.append(f"below {schema['exclusiveMaximum']:.10g}")
    return " " + " and ".join(parts) if parts else ""
