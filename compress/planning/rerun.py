"""The config of a finished run, changed to write one more format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.core.errors import CheckpointError, ConfigError
from compress.core.foreign import MALFORMED, parse_json


def config_of_export(
    workdir: Path, to: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the config that adds an export to a finished run, as plain data.

    Args:
        workdir: Of the run.
        to: Name of the format.
        options: Of its exporter.

    Raises:
        ConfigError: There is no finished run.
        CheckpointError: Its files are damaged.
    """
    report = workdir / "report.json"
    if not report.is_file():
        raise ConfigError(f"{workdir}: no finished run here (no report.json)")
    try:
        data: dict[str, Any] = parse_json(report.read_text("utf-8"))["config"]
        kept = [entry for entry in data.get("export") or [] if entry["format"] != to]
        scale = parse_json((workdir / "plan.json").read_text("utf-8"))["layers"]
        if data.get("quantize") and scale:
            # The codes are there already: their scales cannot change type any more.
            kinds = {entry["scheme"]["scale_dtype"] for entry in scale.values()}
            data["quantize"]["scale_dtype"] = kinds.pop()
        data["export"] = [*kept, {"format": to, **options}]
        data["run"]["workdir"] = str(workdir)
    except (OSError, *MALFORMED) as error:
        raise CheckpointError(
            f"{workdir}: report.json and plan.json are not those of a finished run: "
            f"{type(error).__name__}: {error}; run the config again"
        ) from error
    return data
