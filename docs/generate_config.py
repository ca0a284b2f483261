"""Writes ``docs/config.md``, the reference of the config, from the schema itself.

    python docs/generate_config.py

The tests compare the file with :func:`render`, so it cannot fall behind the code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TARGET = Path(__file__).with_name("config.md")

HEAD = """\
# Config reference

<!-- Written by docs/generate_config.py from the schema. Do not edit. -->

A config is one YAML file. Every section but `model` is optional; nothing is quantized
without `quantize`, and nothing is measured without `evaluate`. Unknown keys are errors,
and values are not converted: `"128"` is text, not a number. Relative paths start at the
directory that the command is called from. `--set section.key=value` overrides one key.
`compress schema` prints the same as JSON Schema, for editors.
"""

SECTIONS = (
    "model",
    "calibration",
    "prune",
    "recover",
    "transforms",
    "quantize",
    "tune",
    "budget",
    "allocate",
    "kv_cache",
    "evaluate",
    "export",
    "run",
)
NESTED = {
    "calibration": (("WeightedSource", "data[]", "Entries of a list in `data`"),),
    "quantize": (
        ("Override", "overrides.*", "Values of `overrides`"),
        ("UpgradeInputsSection", "upgrade_inputs", "Keys of `upgrade_inputs`"),
    ),
}


def render() -> str:
    """Return the whole page."""
    from compress import registry
    from compress.config import config_schema
    from compress.config.recover_section import RECOVERIES
    from compress.config.tune_section import TUNINGS
    from compress.transforms.catalog import TRANSFORMS

    schema = config_schema()
    parts = [HEAD]
    for name in SECTIONS:
        parts += _section(name, schema)
        if name == "transforms":
            parts += _options("name", TRANSFORMS)
        if name == "prune":
            found = {entry.name: entry for entry in registry.entries("pruners")}
            parts += _options("method", _built_in(found))
        if name == "quantize":
            parts += _options("method", _built_in(registry.quantizers()))
        if name == "allocate":
            found = {entry.name: entry for entry in registry.entries("allocators")}
            parts += _options("method", _built_in(found))
        if name in ("recover", "tune"):
            methods = RECOVERIES if name == "recover" else TUNINGS
            for method, kind in methods.items():
                table = kind.model_json_schema()
                title = f"### Options of `method: {method}`"
                summary = kind.summary[0].upper() + kind.summary[1:]
                parts += [title, "", f"{summary}.", "", *_table(table, table)]
        if name == "export":
            parts += _options("format", _built_in(registry.exporters()))
    return "\n".join(parts)


def _section(name: str, schema: dict[str, Any]) -> list[str]:
    definition = _definition(schema["properties"][name], schema)
    if name == "export":
        intro = "A list; each entry names a format and may set its options (below)."
    elif name == "transforms":
        intro = (
            "A list, applied in order; each entry is a name, or `{name: NAME, ...}` "
            "with options (below). They change no output: [transforms](transforms.md)."
        )
    else:
        intro = definition["description"]
    lines = [f"## {name}", "", intro, "", *_table(definition, schema)]
    for key, place, title in NESTED.get(name, ()):
        inner = schema["$defs"][key]
        lines += [f"{title} (`{name}.{place}`):", "", *_table(inner, schema)]
    return lines


def _built_in(entries: dict[str, Any]) -> dict[str, Any]:
    """Return the classes of plug-ins that this distribution registers."""
    return {
        name: entry.load()
        for name, entry in sorted(entries.items())
        if entry.origin.startswith("compress-llm ")
    }


def _options(word: str, plugins: Mapping[str, Any]) -> list[str]:
    """Describe the options of classes by name."""
    lines = []
    for name, plugin in plugins.items():
        schema = plugin.Options.model_json_schema()
        if not schema["properties"]:
            continue
        described: dict[str, str] = {}
        for base in reversed(plugin.Options.__mro__):  # options may extend others
            described |= _attributes(base.__doc__ or "")
        for key, value in schema["properties"].items():
            if "description" not in value:
                value["description"] = described[key]
        summary = plugin.summary[0].upper() + plugin.summary[1:]
        lines += [f"### Options of `{word}: {name}`", "", f"{summary}.", ""]
        lines += _table(schema, schema)
    return lines


def _attributes(docstring: str) -> dict[str, str]:
    """Return the texts of a docstring's ``Attributes`` by name."""
    found: dict[str, str] = {}
    for entry in re.split(r"\n {8}(?=\w+: )", docstring.partition("Attributes:")[2]):
        name, _, text = entry.partition(": ")
        found[name.strip()] = " ".join(text.replace("``", "`").split())
    return found


def _table(definition: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    required = definition.get("required", [])
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for key, value in definition["properties"].items():
        default = "required" if key in required else f"`{_default(value)}`"
        meaning = value.get("description", "").replace("|", "\\|")
        lines.append(f"| `{key}` | {_type(value, schema)} | {default} | {meaning} |")
    return [*lines, ""]


def _default(value: dict[str, Any]) -> str:
    default = value.get("default")
    return default if isinstance(default, str) else json.dumps(default)


def _type(value: dict[str, Any], schema: dict[str, Any]) -> str:
    if "$ref" in value:
        return _type_name(value["$ref"])
    if "enum" in value:
        return " \\| ".join(f"`{choice}`" for choice in value["enum"])
    options = value.get("anyOf") or value.get("oneOf")
    if options:
        return " or ".join(_type(option, schema) for option in options)
    kind = value["type"]
    if kind == "array":
        return f"list of {_type(value['items'], schema)}"
    words = {"integer": "whole number", "string": "text", "object": "mapping"}
    if value.get("format") == "path":
        return "path"
    return f"{words.get(kind, kind)}{_limits(value)}"


def _type_name(reference: str) -> str:
    names = {
        "WeightedSource": "`{source, weight}`",
        "UpgradeInputsSection": "mapping",
    }
    return names[reference.rpartition("/")[2]]


def _limits(value: dict[str, Any]) -> str:
    words = (
        ("minimum", "at least"),
        ("exclusiveMinimum", "above"),
        ("maximum", "at most"),
        ("exclusiveMaximum", "below"),
    )
    limits = [f"{word} {value[key]:g}" for key, word in words if key in value]
    return f", {', '.join(limits)}" if limits else ""


def _definition(value: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Follow a property to the definition of its section."""
    if value.get("type") == "array":
        value = value["items"]
    choices = [
        key for word in ("anyOf", "oneOf", "allOf") for key in value.get(word, ())
    ]
    for option in (value, *choices):
        if "$ref" in option:
            found: dict[str, Any] = schema["$defs"][option["$ref"].rpartition("/")[2]]
            return found
    raise KeyError(f"no section in {value}")


if __name__ == "__main__":
    TARGET.write_text(render(), "utf-8")
