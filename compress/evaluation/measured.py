"""What was measured of a model, in a file, so that it is not measured again.

A part is one text under one protocol, or one task. It carries the digest of all that it
depends on; a part with another digest is none. The file is written after each part.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.workdir import write_atomically

_log = logging.getLogger(__name__)


class Measured:
    """Parts of one model.

    Args:
        path: The file; read if it is there.
        overwrite: Forget what it holds.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        self._path = path
        self._parts: dict[str, dict[str, Any]] = {}
        if path.is_file() and not overwrite:
            self._parts = _read(path)

    def part(self, name: str, key: str) -> Mapping[str, Any] | None:
        """Return what was measured under ``key``, or ``None``."""
        found = self._parts.get(name)
        return found["data"] if found and found["key"] == key else None

    def add(self, name: str, key: str, data: Mapping[str, Any]) -> None:
        """Keep a part, in the file at once."""
        self._parts[name] = {"key": key, "data": dict(data)}
        text = json.dumps({"version": 1, "parts": self._parts})
        write_atomically(self._path, text.encode())


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        parts = json.loads(path.read_text("utf-8"))["parts"]
        return {name: {"key": p["key"], "data": p["data"]} for name, p in parts.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("%s is damaged, its parts are measured again: %s", path, error)
        return {}
