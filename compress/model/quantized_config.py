"""The ``quantization_config`` of a checkpoint: which layers have codes, of what kind.

This is about compressed-tensors; palette and aqlm are in ``table_source``. What would
change weights without our knowing it (online transforms, sparsity, reordered columns)
is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.core import compressed_tensors as ct
from compress.core.errors import CheckpointError
from compress.core.foreign import parse_json


@dataclass(frozen=True)
class ConfigGroup:
    """A config group with its format.

    Attributes:
        entry: As it stands in ``config.json``.
        format: Its own format, or that of the whole checkpoint.
    """

    entry: Mapping[str, Any]
    format: str

    @property
    def targets(self) -> tuple[str, ...]:
        """Names, ``re:`` patterns and class names of layers."""
        return tuple(self.entry.get("targets", ()))


def folder_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json`` of a folder.

    Raises:
        CheckpointError: There is none that can be read.
    """
    path = folder / "config.json"
    try:
        config = parse_json(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: not a model config")
    return config


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """Return the ``quantization_config`` of a folder's config, if it has one.

    Raises:
        CheckpointError: There is no readable ``config.json``.
    """
    quantization = folder_config(folder).get("quantization_config")
    return dict(quantization) if quantization else None


def config_groups(folder: Path) -> list[ConfigGroup]:
    """Return the config groups of a folder, after checking that we can read them.

    There may be none if only the key-value cache is quantized.

    Raises:
        CheckpointError: The folder is not quantized, or in a way that is not read.
    """
    quantization = quantization_of(folder)
    if quantization is None:
        raise CheckpointError(f"{folder}: config.json has no quantization_config")
    method = quantization.get("quant_method")
    if method != ct.QUANT_METHOD:
        raise CheckpointError(
            f"{folder}: quant_method {method!r}; only {ct.QUANT_METHOD}, palette and "
            "aqlm are read"
        )
    for key in ("transform_config", "sparsity_config"):
        if quantization.get(key):
            raise CheckpointError(f"{folder}: {key} is not read; it changes weights")
    groups = []
    for entry in quantization.get("config_groups", {}).values():
        if not isinstance(entry, dict) or not isinstance(entry.get("weights"), dict):
            raise CheckpointError(
                f"{folder}: preset config groups are not read; write out their weights"
            )
        name = entry.get("format") or quantization.get("format")
        try:
            ct.layout_named(str(name))
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from error
        if entry.get("output_activations"):
            raise CheckpointError(f"{folder}: quantized outputs are not read")
        groups.append(ConfigGroup(entry, str(name)))
    if not groups and not quantization.get("kv_cache_scheme"):
        raise CheckpointError(f"{folder}: quantization_config has no groups")
    return groups


def group_of(layer: str, groups: list[ConfigGroup]) -> ConfigGroup | None:
    """Return the group of a layer: exact names first, as in the library."""
    exact = [g for g in groups if layer in g.targets]
    patterns = [g for g in groups if _matches(layer, g.targets)]
    classes = [g for g in groups if "Linear" in g.targets]
    return next(iter((*exact, *patterns, *classes)), None)


def _matches(layer: str, targets: tuple[str, ...]) -> bool:
    return any(t.startswith("re:") and re.match(t[3:], layer) for t in targets)
