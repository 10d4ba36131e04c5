"""JSON Schema of a space file, from the models' own: what editors complete and messages explain."""

from __future__ import annotations

from functools import cache
from typing import Any

from hiertune.config import SearchConfig, TrialConfig

_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


@cache
def plain_schema() -> dict[str, Any]:
    """Schema of a space file without distributions; `$defs` are named after the models. Do not modify."""
    search, trial = SearchConfig.model_json_schema(), TrialConfig.model_json_schema()
    return {
        "type": "object",
        "properties": {
            "name": search["properties"].pop("name"),
            **trial["properties"],
            **search["properties"],
        },
        "required": ["name", *trial["required"]],
        "additionalProperties": False,
        "$defs": {**trial["$defs"], **search["$defs"]},
    }


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a whole space file.

    In the trial's sections every value may also be a distribution: ranges where a number is
    expected, within the bounds of that number, and `choice` anywhere, nested as deep as you like.
    What is stricter than a schema can say (low above high, a log range through zero) is left to
    `load_space`.
    """
    plain = plain_schema()
    searched = set(TrialConfig.model_json_schema()["$defs"])
    definitions: dict[str, Any] = {}
    for name, model in plain["$defs"].items():
        definitions[name] = _section(model, name if name in searched else None, definitions)
    whole = {key: value for key, value in plain.items() if key != "$defs"}
    sections = {key: whole["properties"][key] for key in TrialConfig.model_fields}
    opened = _section({"properties": sections}, "TrialConfig", definitions)["properties"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "hiertune space",
        "description": "What a search tries: any value of a trial's sections may be a distribution.",
        **whole,
        "properties": {**whole["properties"], **opened},
        "$defs": definitions,
    }


def _section(model: dict[str, Any], name: str | None, definitions: dict[str, Any]) -> dict[str, Any]:
    """A model's schema, its properties opened to distributions if it has a `name` to file them under."""
    properties = {}
    required = list(model.get("required", []))
    for key, schema in model["properties"].items():
        schema = {word: value for word, value in schema.items() if word != "title"}
        properties[key] = _opened(schema, f"{name}.{key}", definitions) if name else schema
        if key == "kind":
            required.append(key)  # it tells branches apart, so it is never left to its default
    return {**model, "properties": properties, "required": required}


def _opened(schema: dict[str, Any], name: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """A reference to the definition `name`: the value itself, or a distribution of such values."""
    notes: dict[str, Any] = {word: schema[word] for word in ("description", "default") if word in schema}
    value = {word: part for word, part in schema.items() if word not in notes}
    for word in ("items", "additionalProperties"):
        if isinstance(value.get(word), dict):
            value[word] = _opened(value[word], f"{name}[]", definitions)
    if "prefixItems" in value:
        items = enumerate(value["prefixItems"])
        value["prefixItems"] = [_opened(item, f"{name}[{index}]", definitions) for index, item in items]
    reference: dict[str, Any] = {"$ref": f"#/$defs/{name}"}
    choice = _one_key("choice", {"type": "array", "minItems": 1, "items": reference})
    definitions[name] = {"anyOf": [value, *_ranges(schema), choice]}
    return {**reference, **notes}


def _ranges(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The ranges that may stand for a number (or for an optional one), with its bounds on both ends."""
    options = schema.get("anyOf", [schema])
    number = next((option for option in options if option.get("type") in ("integer", "number")), None)
    if number is None:
        return []
    bounds = {word: number[word] for word in _BOUNDS if word in number}
    whole = {"type": "integer", **bounds}
    ranges = [_range("int", whole), _range("logint", {**whole, "minimum": max(1, bounds.get("minimum", 1))})]
    if number["type"] == "number":
        real = {"type": "number", **bounds}
        positive = {**real, "exclusiveMinimum": max(0, bounds.get("exclusiveMinimum", 0))}
        step = {"type": "number", "exclusiveMinimum": 0}
        ranges += [
            _range("uniform", real),
            _range("loguniform", positive),
            _range("quniform", real, step),
        ]
    return ranges


def _range(name: str, end: dict[str, Any], *more: dict[str, Any]) -> dict[str, Any]:
    items = [end, end, *more]
    return _one_key(
        name,
        {
            "type": "array",
            "prefixItems": items,
            "items": False,
            "minItems": len(items),
            "maxItems": len(items),
        },
    )


def _one_key(key: str, value: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {key: value}, "required": [key], "additionalProperties": False}
