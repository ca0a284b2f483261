"""Errors of a config as ``file:line:column: path: message; did you mean ...``."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from compress.core.errors import ConfigError

KeyPath = tuple[str | int, ...]
Place = tuple[int, int, str]  # line and column from 1 (0 if not in a file), and text

_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "keys and values",
    "float_type": "a number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_type": "keys and values",
    "path_type": "a path",
    "string_type": "text",
    "tuple_type": "a list",
}
_UNION_TAG = re.compile(r"<.*>|\[key\]")


def path_text(path: KeyPath) -> str:
    """Return ``a.b.0``; keys that hold a dot are quoted, as ``--set`` reads them."""
    return ".".join(f'"{part}"' if "." in str(part) else str(part) for part in path)


def suggest(name: object, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?``, or the known names when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""


@dataclass(frozen=True)
class Assignment:
    """A ``--set`` of the command line: its path, its value and its text."""

    path: KeyPath
    value: Any
    text: str


@dataclass(frozen=True)
class Origin:
    """Where each key of a config was written.

    Attributes:
        file: Name for messages; empty for a config built in Python.
        root: The YAML document.
        assignments: What was set over it, later ones last.
    """

    file: str = ""
    root: Node | None = None
    assignments: Sequence[Assignment] = ()

    def locate(self, path: KeyPath) -> Place:
        """Return line and column, from 1, and the text of the place of ``path``.

        A path that does not exist, such as a missing key, is at its nearest parent.
        Places that are not in a file have line 0.
        """
        for assignment in reversed(self.assignments):
            if path[: len(assignment.path)] == assignment.path:
                return 0, 0, f"--set {assignment.text}"
        mark, depth = _walk(self.root, path)
        if depth == 0:
            for assignment in reversed(self.assignments):
                if path[:1] == assignment.path[:1]:
                    return 0, 0, f"--set {assignment.text}"
        if mark is None:
            return 0, 0, self.file
        return self.at(mark)

    def at(self, mark: Any) -> Place:
        """Return the place of a mark of the YAML reader, which counts from 0."""
        line, column = mark.line + 1, mark.column + 1
        return line, column, f"{self.file}:{line}:{column}"


def _walk(root: Node | None, path: KeyPath) -> tuple[Any, int]:
    """Return the mark of the last element of ``path`` that exists, and its depth."""
    mark, node = (root.start_mark if root is not None else None), root
    for depth, part in enumerate(path):
        child = None
        if isinstance(node, MappingNode):
            for key, value in node.value:
                if key.value == part:
                    child, mark = value, key.start_mark
                    break
        elif isinstance(node, SequenceNode) and isinstance(part, int):
            if part < len(node.value):
                child = node.value[part]
                mark = child.start_mark
        if child is None:
            return mark, depth
        node = child
    return mark, len(path)


@dataclass
class Findings:
    """Collects errors, so that all of a file are told at once."""

    origin: Origin
    _lines: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, path: KeyPath, message: str, *, place: Place | None = None) -> None:
        """Add an error about ``path``, at ``place`` if it is known better."""
        line, column, where = place or self.origin.locate(path)
        text = ": ".join(part for part in (where, path_text(path), message) if part)
        self._lines.setdefault(text, (line, column))

    def add_validation(
        self, error: ValidationError, schema: Mapping[str, Any], prefix: KeyPath = ()
    ) -> None:
        """Add each error of a pydantic model that sits at ``prefix``."""
        for item in error.errors(include_url=False):
            location = tuple(
                part
                for part in item["loc"]
                if not (isinstance(part, str) and _UNION_TAG.fullmatch(part))
            )
            self.add(prefix + location, _explain(dict(item), location, schema))

    def raise_any(self) -> None:
        """Raise all errors in the order of the file.

        Raises:
            ConfigError: There was at least one.
        """
        if self._lines:
            ordered = sorted(self._lines, key=lambda text: self._lines[text])
            raise ConfigError("\n".join(ordered))


def _explain(item: dict[str, Any], path: KeyPath, schema: Mapping[str, Any]) -> str:
    """Say what pydantic found, in the words of a config's author."""
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    if kind == "extra_forbidden":
        return "unknown key" + suggest(path[-1], known_keys(schema, path[:-1]))
    if kind == "missing":
        return "required key is missing"
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        hint = suggest(value, choices) if _is_near(value, choices) else ""
        return f"expected {context['expected']}, got {describe(value)}{hint}"
    if kind == "string_pattern_mismatch":
        hint = _described(schema, path)
        return f"{describe(value)} is not one of: {hint}" if hint else item["msg"]
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, got {describe(value)}"
    message = str(item["msg"])
    return f"{message[:1].lower()}{message[1:]}, got {describe(value)}"


def _is_near(value: object, choices: Iterable[str]) -> bool:
    return bool(difflib.get_close_matches(str(value), list(choices), n=1))


def describe(value: object) -> str:
    """Return a short form of a value with its kind, as YAML users name it."""
    kinds = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "keys and values",
    }
    if value is None:
        return "nothing"
    shown = str(value).lower() if isinstance(value, bool) else reprlib.repr(value)
    return f"{shown} ({kinds.get(type(value), type(value).__name__)})"


def known_keys(schema: Mapping[str, Any], path: KeyPath) -> list[str]:
    """Return the keys that a JSON Schema allows in the mapping at ``path``."""
    for node in _nodes_at(schema, path):
        if "properties" in node:
            return sorted(node["properties"])
    return []


def _described(schema: Mapping[str, Any], path: KeyPath) -> str:
    for node in _nodes_at(schema, path):
        if "description" in node:
            return str(node["description"]).rstrip(".")
    return ""


def _nodes_at(schema: Mapping[str, Any], path: KeyPath) -> list[Mapping[str, Any]]:
    """Follow ``path`` through a JSON Schema; a union gives several ends."""
    nodes = _alternatives(schema, schema)
    for part in path:
        below: list[Mapping[str, Any]] = []
        for node in nodes:
            if isinstance(part, int):
                child = node.get("items")
            else:
                child = node.get("properties", {}).get(
                    part, node.get("additionalProperties")
                )
            if isinstance(child, Mapping):
                below += _alternatives(child, schema)
        nodes = below
    return nodes


def _alternatives(
    node: Mapping[str, Any], schema: Mapping[str, Any]
) -> list[Mapping[str, Any]]:
    """Resolve references and unions."""
    found: list[Mapping[str, Any]] = []
    if "$ref" in node:
        found += _alternatives(
            schema["$defs"][node["$ref"].removeprefix("#/$defs/")], schema
        )
    for choice in (*node.get("anyOf", ()), *node.get("oneOf", ())):
        found += _alternatives(choice, schema)
    return [node, *found]
