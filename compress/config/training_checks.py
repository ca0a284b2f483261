"""Check the sections that train: their methods' names and options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from compress.config.diagnostics import Findings, KeyPath, Origin, suggest
from compress.config.recover_section import (
    RECOVERIES,
    RecoverOptions,
    RecoverSection,
)
from compress.config.tune_section import TUNINGS, TuneOptions, TuneSection
from compress.core.errors import ConfigError


def recover_options(section: RecoverSection) -> RecoverOptions:
    """Return the checked options of the section ``recover``.

    Raises:
        ConfigError: The method or an option is wrong.
    """
    if section.method not in RECOVERIES:
        raise ConfigError(_unknown_recovery(section.method))
    options: RecoverOptions = validated(
        RECOVERIES[section.method], section.options, ("recover", "options")
    )
    return options


def tune_options(section: TuneSection) -> TuneOptions:
    """Return the checked options of the section ``tune``.

    Raises:
        ConfigError: The method or an option is wrong.
    """
    if section.method not in TUNINGS:
        raise ConfigError(_unknown_tuning(section.method))
    kind, path = TUNINGS[section.method], ("tune", "options")
    options: TuneOptions = validated(kind, section.options, path)
    return options


def _unknown_recovery(name: str) -> str:
    return f"unknown method of recovery {name!r}{suggest(name, RECOVERIES)}"


def _unknown_tuning(name: str) -> str:
    return f"unknown method of tuning {name!r}{suggest(name, TUNINGS)}"


def validated(kind: type[BaseModel], options: Mapping[str, Any], path: KeyPath) -> Any:
    """Return options checked by their model.

    Raises:
        ConfigError: With a line for each error, its path prefixed by ``path``.
    """
    try:
        return kind.model_validate(dict(options))
    except ValidationError as error:
        findings = Findings(Origin())
        findings.add_validation(error, kind.model_json_schema(), path)
        findings.raise_any()
        raise  # unreachable: a validation error has at least one line


def check_recover(section: dict[str, Any], findings: Findings) -> None:
    """Add what is wrong with the section ``recover``."""
    name, options = section.get("method", "distill"), section.get("options", {})
    if not isinstance(name, str) or not isinstance(options, dict):
        return  # the schema says so
    if name not in RECOVERIES:
        findings.add(("recover", "method"), _unknown_recovery(name))
        return
    kind = RECOVERIES[name]
    try:
        kind.model_validate(options)
    except ValidationError as error:
        findings.add_validation(error, kind.model_json_schema(), ("recover", "options"))


def check_tune(section: dict[str, Any], findings: Findings) -> None:
    """Add what is wrong with the section ``tune``."""
    default = TuneSection.model_fields["method"].default
    name, options = section.get("method", default), section.get("options", {})
    if not isinstance(name, str) or not isinstance(options, dict):
        return  # the schema says so
    if name not in TUNINGS:
        findings.add(("tune", "method"), _unknown_tuning(name))
        return
    kind = TUNINGS[name]
    try:
        kind.model_validate(options)
    except ValidationError as error:
        findings.add_validation(error, kind.model_json_schema(), ("tune", "options"))
