"""YAML text to nodes that remember their line, and back.

Reading stops at YAML's node graph: no object is ever constructed from a tag, aliases and tags are
refused, and depth and size are bounded, so a file can neither run code nor exhaust memory. Plain
scalars follow YAML 1.2's core schema: `1e-4` is a number, `yes` and `on` are text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from hiertune._text import without_password
from hiertune.errors import InputError

MAX_BYTES = 1 << 18
"""Largest file read; space files are a few kilobytes."""
MAX_DEPTH = 32
"""Deepest nesting of lists and mappings."""

Scalar = None | bool | int | float | str
Key = tuple[str | int | tuple[Scalar], ...]
"""Where a value stands, from the top: keys of mappings, indices into lists, `(label,)` for a branch taken."""


@dataclass(frozen=True)
class Node:
    """A value and the line it stands on (a mapping's values: the line of their key).

    `value` is a scalar, a tuple of nodes, a dict of nodes, or (after `read_tree`) a distribution.
    Equality ignores lines.
    """

    value: Any
    line: int = field(compare=False)


def key_text(key: Key) -> str:
    """`("model", "hidden", 0)` as `model.hidden[0]`, `("head", ("linear",))` as `head[linear]`."""
    text = ""
    for part in key:
        if isinstance(part, str):
            text += ("." if text else "") + (part if part.isprintable() else repr(part))
        else:
            text += f"[{part[0] if isinstance(part, tuple) else part}]"
    return text


def shown_key(key: Key) -> str:
    """`key_text` cut to a length that fits a message."""
    text = key_text(key)
    return text if len(text) <= 200 else text[:197] + "..."


def show(value: Any) -> str:
    """A value as a user wrote it, without the passwords of addresses, cut to a readable length."""
    if value is None:
        text = "null"
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, dict):
        text = f"a mapping with the key '{next(iter(value))}'" if len(value) == 1 else "a mapping"
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(show(item) for item in value[:8]) + (", ..." if len(value) > 8 else "") + "]"
    else:
        text = repr(without_password(value) if isinstance(value, str) else value)
    return text if len(text) <= 80 else text[:77] + "..."


# ------------------------------------------------------------------------------------- reading


def read_yaml(path: Path) -> tuple[str, Node]:
    """The text of a file, and its top mapping.

    Raises InputError for a file that cannot be read, is not UTF-8, or is not plain YAML.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=path) from None
    except ValueError:  # a NUL in the path
        raise InputError("is not a file name") from None
    if len(raw) > MAX_BYTES:
        raise InputError(f"is larger than {MAX_BYTES // 1024} KiB: not a YAML file of settings", file=path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError("is not UTF-8 text", file=path, line=line) from None
    return text, parse_yaml(text, path)


def parse_yaml(text: str, file: Path | None = None) -> Node:
    """The top mapping of a YAML text; raises InputError with the line of what is wrong."""
    try:
        composer = _Composer(text)
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"the character U+{error.character:04X} is not allowed"
        raise InputError(f"is not valid YAML: {problem}", file=file, line=line) from None
    try:
        top = composer.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        if "'\\t'" in problem:
            problem += " (indent with spaces, not tabs)"
        at = mark.line + 1 if mark else None
        prefix = "" if isinstance(error, _Refused) else "is not valid YAML: "
        raise InputError(prefix + problem, file=file, line=at) from None
    except (ValueError, OverflowError):  # PyYAML makes characters of "\UFFFFFFFF" unchecked
        problem = "is not valid YAML: an escape that is no character"
        raise InputError(problem, file=file, line=composer.line + 1) from None
    if top is None:
        raise InputError("is empty", file=file)
    node = _convert(top, (), top.start_mark.line + 1, file)
    if not isinstance(node.value, dict):
        what = "a list" if isinstance(node.value, tuple) else "a single value"
        raise InputError(f"must be a mapping of sections, got {what}", file=file, line=node.line)
    return node


class _Refused(yaml.MarkedYAMLError):
    """YAML, but not what a file of settings needs."""

    def __init__(self, event: Any, problem: str) -> None:
        super().__init__(problem=problem, problem_mark=event.start_mark)


class _Composer(Reader, Scanner, Parser, Composer, BaseResolver):
    """PyYAML up to the node graph, without aliases, tags or endless nesting."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)
        self._depth = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _Refused(event, f"the alias '*{event.anchor}' is not supported: write the value out")
        if event.tag is not None:
            tag = event.tag.replace(_TAG, "!!")
            raise _Refused(event, f"the tag '{tag}' is not allowed: nothing in this file is executed")
        if self._depth == MAX_DEPTH:
            raise _Refused(event, f"nested more than {MAX_DEPTH} deep")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


_TAG = "tag:yaml.org,2002:"
_PLAIN = (  # YAML 1.2.2, section 10.3.2; the first that matches
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)
for _name, _pattern, _first in _PLAIN:
    _Composer.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_pattern})\\Z"), _first)


def _convert(node: yaml.Node, key: Key, line: int, file: Path | None) -> Node:
    if isinstance(node, yaml.ScalarNode):
        return Node(_scalar(node, key, file), line)
    if isinstance(node, yaml.SequenceNode):
        items = enumerate(node.value)
        return Node(
            tuple(_convert(item, (*key, i), item.start_mark.line + 1, file) for i, item in items), line
        )
    entries: dict[str, Node] = {}
    for name_node, value in node.value:
        at = name_node.start_mark.line + 1
        if not isinstance(name_node, yaml.ScalarNode):
            raise InputError("a key must be plain text", file=file, line=at, key=shown_key(key))
        name = _text(name_node, key, file)
        if name in entries:
            first = entries[name].line
            raise InputError(
                f"duplicate key (first on line {first})", file=file, line=at, key=shown_key((*key, name))
            )
        entries[name] = _convert(value, (*key, name), at, file)
    return Node(entries, line)


def _scalar(node: yaml.ScalarNode, key: Key, file: Path | None) -> Scalar:
    text = _text(node, key, file)
    match node.tag.removeprefix(_TAG):
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            if len(text) > 20 or abs(number := int(text, 0 if text[:2] in ("0x", "0o") else 10)) >= 2**63:
                line = node.start_mark.line + 1
                raise InputError("is too large a number", file=file, line=line, key=shown_key(key))
            return number
        case "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _text(node: yaml.ScalarNode, key: Key, file: Path | None) -> str:
    text = node.value
    if re.search("[\ud800-\udfff]", text):  # "\ud800" in quotes: half a character
        raise InputError("is not valid text", file=file, line=node.start_mark.line + 1, key=shown_key(key))
    return text


# ------------------------------------------------------------------------------------- writing


class _Dumper(yaml.SafeDumper):
    """Mappings as blocks, lists in one line, plain scalars by the rules of `_Composer`."""

    yaml_implicit_resolvers = _Composer.yaml_implicit_resolvers


def _represent_list(dumper: _Dumper, items: list) -> yaml.Node:
    return dumper.represent_sequence(_TAG + "seq", items, flow_style=True)


_Dumper.add_representer(list, _represent_list)


def dump_yaml(tree: dict[str, Any]) -> str:
    """A tree of dicts, lists and scalars as YAML text that `parse_yaml` reads back unchanged."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
