"""What was measured of a model, in a file, so that it is not measured again.

A part is one text under one protocol, or one task. Its key is the digest of all that it
depends on: tokens, questions, base. The file is written after each part.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.core.foreign import MALFORMED, parse_json
from compress.workdir import write_atomically

_log = logging.getLogger(__name__)


class Measured:
    """Parts of one model, by key.

    Args:
        path: The file; read if it is there.
        overwrite: Forget what it holds.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        self._path = path
        self._parts: dict[str, dict[str, Any]] = {}
        if path.is_file() and not overwrite:
            self._parts = _read(path)

    def part(self, key: str) -> Mapping[str, Any] | None:
        """Return what was measured under ``key``, or ``None``."""
        found = self._parts.get(key)
        return found["data"] if found else None

    def add(self, key: str, name: str, data: Mapping[str, Any]) -> None:
        """Keep a part, in the file at once; ``name`` is for readers of the file."""
        self._parts[key] = {"name": name, "data": dict(data)}
        text = json.dumps({"version": 1, "parts": self._parts})
        write_atomically(self._path, text.encode())


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        parts = parse_json(path.read_text("utf-8"))["parts"]
        return {k: {"name": p["name"], "data": p["data"]} for k, p in parts.items()}
    except (OSError, *MALFORMED) as error:
        _log.warning("%s is damaged, its parts are measured again: %s", path, error)
        return {}
