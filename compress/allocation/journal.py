"""Measurements of a search on disk, so that a search that was killed goes on.

Allocators are deterministic by their seed: started again, one asks for the same
assignments in the same order. Whatever was measured before is answered from a file, and
the search is soon where it was, with the same result to the last bit. A search under
another budget, or by another allocator, profits as well.

The file has a line of JSON for each measurement, appended as it is made. A line that a
full disk or a power cut left half-written is measured again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from compress.core.foreign import MALFORMED, parse_json

_log = logging.getLogger(__name__)

Assignment = Sequence[int | None]
"""Index of a choice for each unit; ``None`` where a unit stays dense."""

Measure = Callable[[Assignment, float], float]
"""Returns the KL in nats of an assignment on a share of the text."""

_Key = tuple[tuple[int | None, ...], float]


class Journal:
    """Answers from a file what was measured before, and measures the rest.

    Args:
        path: Named by all that decides a measurement.
        measure: Runs the model.
    """

    def __init__(self, path: Path, measure: Measure) -> None:
        self._path, self._measure = path, measure
        self._known, self._is_torn = _read(path)
        if self._known:
            _log.info("%d measurements of an earlier search are used", len(self._known))

    def __call__(self, assignment: Assignment, share: float = 1.0) -> float:
        """Return the KL in nats of an assignment on a share of the text."""
        key = (tuple(assignment), float(share))
        if key not in self._known:
            self._known[key] = self._measure(assignment, share)
            self._append(key)
        return self._known[key]

    def _append(self, key: _Key) -> None:
        line = json.dumps([list(key[0]), key[1], self._known[key]])
        start = "\n" if self._is_torn else ""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{start}{line}\n")
            self._is_torn = False
        except OSError as error:
            self._is_torn = True
            _log.warning("a measurement of the search is not kept: %s", error)


def _read(path: Path) -> tuple[dict[_Key, float], bool]:
    """Return the measurements of a file, and whether its last line is cut short."""
    known: dict[_Key, float] = {}
    try:
        text = path.read_text("utf-8") if path.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        _log.warning("%s is not used: %s", path, error)
        return known, True
    for line in text.splitlines():
        try:
            indices, share, value = parse_json(line)
            key = tuple(None if i is None else int(i) for i in indices), float(share)
            known[key] = float(value)
        except MALFORMED:
            continue  # measured again
    return known, bool(text) and not text.endswith("\n")
