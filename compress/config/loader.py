"""Read a config: YAML 1.2 to nodes with positions, to plain data, to a ``Config``.

ruamel.yaml is used rather than PyYAML because PyYAML reads ``1e-4`` as text, ``no`` as
false, and takes the last of two equal keys in silence. The document is only composed;
plain data is built here from the nodes, so that nothing but mappings, lists and scalars
can come out of a file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from compress.config.diagnostics import (
    Assignment,
    Findings,
    KeyPath,
    Origin,
    Place,
    describe,
)
from compress.config.plugins import check_plugins
from compress.config.schema import Config
from compress.config.sweep_sections import SweepConfig
from compress.core.errors import ConfigError

_Checked = TypeVar("_Checked", bound=BaseModel)
_TAG = "tag:yaml.org,2002:"
_COLLECTIONS = (f"{_TAG}map", f"{_TAG}seq")
_SET = re.compile(
    r'\s*((?:"[^"]*"|[^".=\s]+)(?:\.(?:"[^"]*"|[^".=\s]+))*)\s*=(.*)', re.S
)
_PART = re.compile(r'"([^"]*)"|([^".]+)')


def load_config(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()
) -> Config:
    """Return the checked config of a YAML file or of plain data.

    Relative paths inside it are relative to the current directory.

    Args:
        source: A YAML file, or the same content as a mapping.
        overrides: ``a.b=value`` each, the value in YAML; they win over ``source``.

    Raises:
        ConfigError: With one line for each error, in the order of the file:
            ``file:line:column: path: message``.
    """
    return _load(source, overrides, Config, check_plugins)


def load_sweep(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()
) -> SweepConfig:
    """Return the checked config of a sweep; its base is not read yet.

    Arguments and errors are those of :func:`load_config`.
    """
    return _load(source, overrides, SweepConfig, _nothing_more)


def _nothing_more(data: Mapping[str, Any], findings: Findings) -> None:
    """Stand in where the schema says all."""


def _load(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str],
    kind: type[_Checked],
    check: Callable[[Mapping[str, Any], Findings], None],
) -> _Checked:
    if isinstance(source, Mapping):
        file, root, findings = "", None, Findings(Origin())
        data = _copied(source)
    else:
        file = os.fspath(source)
        root = _compose(_read_text(file), file)
        findings = Findings(Origin(file, root))
        first = next(iter(kind.model_fields))
        data = _document(root, file, findings, first=first)
    assignments = tuple(_parse_assignment(text) for text in overrides)
    findings.origin = Origin(file, root, assignments)
    for assignment in assignments:
        _assign(data, assignment, findings)
    config = None
    try:
        config = kind.model_validate(data)
    except ValidationError as error:
        findings.add_validation(error, kind.model_json_schema())
    check(data, findings)
    findings.raise_any()
    assert config is not None
    return config


def parse_options(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the plain data that ``key=value`` texts of a command line describe.

    Raises:
        ConfigError: A text is no assignment, or its value is not YAML.
    """
    findings = Findings(Origin())
    data: dict[str, Any] = {}
    for text in overrides:
        _assign(data, _parse_assignment(text), findings)
    findings.raise_any()
    return data


def config_schema() -> dict[str, Any]:
    """Return the JSON Schema of the config, for editors and the reference."""
    return Config.model_json_schema()


def _read_text(file: str) -> str:
    try:
        raw = Path(file).read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; give the path of a config") from None
    except IsADirectoryError:
        raise ConfigError(f"{file}: is a folder; give the config file in it") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line = before.count(b"\n") + 1
        column = error.start - (before.rfind(b"\n") + 1) + 1
        raise ConfigError(
            f"{file}:{line}:{column}: not UTF-8 text "
            f"(byte 0x{raw[error.start]:02x}); save the file as UTF-8"
        ) from None


def _compose(text: str, file: str) -> Node | None:
    """Return the root node of the only document in ``text``."""
    yaml = YAML(typ="safe", pure=True)
    try:
        root: Node | None = yaml.compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        parts = [part for part in (error.context, error.problem) if part]
        raise ConfigError(f"{file}{at}: not YAML: {', '.join(parts)}") from None
    except ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        raise ConfigError(
            f"{file}:{line}:{column}: not YAML: control character "
            f"{error.character!r} is not allowed"
        ) from None
    except (YAMLError, RecursionError) as error:
        raise ConfigError(f"{file}: not YAML: {type(error).__name__}") from error
    return root


def _document(
    root: Node | None, file: str, findings: Findings, *, first: str
) -> dict[str, Any]:
    if root is None:
        raise ConfigError(f"{file}:1:1: the file is empty; it needs {first}: ...")
    data = _plain(root, (), findings)
    if not isinstance(data, dict):
        mark = root.start_mark
        raise ConfigError(
            f"{file}:{mark.line + 1}:{mark.column + 1}: expected keys and values, "
            f"got {describe(data)}; the file starts with {first}: ..."
        )
    return data


def _plain(
    node: Node, path: KeyPath, findings: Findings, above: tuple[int, ...] = ()
) -> Any:
    """Build plain data from a node; what cannot be is added to ``findings``."""
    if id(node) in above:
        findings.add(
            path, "an alias refers to itself", place=findings.origin.at(node.start_mark)
        )
        return None
    if not isinstance(node, ScalarNode) and node.tag not in _COLLECTIONS:
        place = findings.origin.at(node.start_mark)
        findings.add(path, f"tag {node.tag} is not supported", place=place)
    above = (*above, id(node))
    if isinstance(node, SequenceNode):
        return [
            _plain(child, (*path, index), findings, above)
            for index, child in enumerate(node.value)
        ]
    if isinstance(node, MappingNode):
        return _mapping(node, path, findings, above)
    assert isinstance(node, ScalarNode)
    return _scalar(node, path, findings)


def _mapping(
    node: MappingNode, path: KeyPath, findings: Findings, above: tuple[int, ...]
) -> dict[str, Any]:
    data: dict[str, Any] = {}
    first: dict[str, Place] = {}
    for key, value in node.value:
        place = findings.origin.at(key.start_mark)
        if not isinstance(key, ScalarNode) or key.tag != f"{_TAG}str":
            name = key.value if isinstance(key, ScalarNode) else "..."
            if key.tag == f"{_TAG}merge":
                reason = "merge keys are not supported; write the keys out"
            else:
                reason = f"a key is text; put {name!r} in quotes if you mean that"
            findings.add(path, reason, place=place)
        elif key.value in data:
            line, column, _ = first[key.value]
            message = f"the same key was given at {line}:{column}; keep one of the two"
            findings.add((*path, key.value), message, place=place)
        else:
            first[key.value] = place
            data[key.value] = _plain(value, (*path, key.value), findings, above)
    return data


def _scalar(node: ScalarNode, path: KeyPath, findings: Findings) -> Any:
    constructor = YAML(typ="safe", pure=True).constructor
    build: dict[str, Callable[[], Any]] = {
        f"{_TAG}null": lambda: None,
        f"{_TAG}bool": lambda: constructor.construct_yaml_bool(node),
        f"{_TAG}int": lambda: constructor.construct_yaml_int(node),
        f"{_TAG}float": lambda: constructor.construct_yaml_float(node),
        f"{_TAG}str": lambda: str(node.value),
        # A date in a config is a file name or an id: it stays the text it is.
        f"{_TAG}timestamp": lambda: str(node.value),
    }
    place = findings.origin.at(node.start_mark)
    if node.tag not in build:
        findings.add(path, f"tag {node.tag} is not supported", place=place)
        return None
    try:
        return build[node.tag]()
    except (ValueError, KeyError):
        kind = str(node.tag).removeprefix(_TAG)
        message = f"{node.value[:40]!r} cannot be read as {kind}"
        findings.add(path, message, place=place)
        return None


def _parse_assignment(text: str) -> Assignment:
    """Read ``a.b=value``; a part with dots is quoted, a number indexes a list."""
    match = _SET.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"--set {text}: expected key.key=value, such as quantize.scheme=int4-g64"
        )
    path: list[str | int] = []
    for quoted, plain in _PART.findall(match[1]):
        path.append(int(plain) if plain.isdecimal() else plain or quoted)
    label = f"--set {text}"
    root = _compose(match[2], label)
    findings = Findings(Origin(label, root))
    value = None if root is None else _plain(root, (), findings)
    findings.raise_any()
    return Assignment(tuple(path), value, text)


def _assign(data: dict[str, Any], assignment: Assignment, findings: Findings) -> None:
    """Put the value at its place, making the mappings on the way."""
    target: Any = data
    *parents, last = assignment.path
    for depth, part in enumerate((*parents, last)):
        if isinstance(target, list) and isinstance(part, int) and part < len(target):
            pass
        elif not isinstance(target, dict):
            where = assignment.path[:depth]
            kind = f"has {len(target)} items" if isinstance(target, list) else "no keys"
            findings.add(
                (*where, part),
                f"cannot be set: its parent {kind}",
                place=(0, 0, f"--set {assignment.text}"),
            )
            return
        if depth == len(parents):
            target[part] = assignment.value
        elif isinstance(target, dict):
            if target.get(part) is None:
                target[part] = {}
            target = target[part]
        else:
            target = target[part]


def _copied(value: Any) -> Any:
    """Copy mappings and lists, so that assignments do not change the caller's."""
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(item) for item in value]
    return value
