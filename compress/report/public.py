"""Reports and files without the paths and hosts of the machine that made them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

# A path from the root, of a drive or of a home; not a part of an address, of a relative
# path, or of a quotient.
_ABSOLUTE = re.compile(r"(?<![\w./:~\\<>])(?:~|[A-Za-z]:)?[/\\][^\s'\"`,;:|(){}\[\]]+")
_DROPPED = ("processes", "host")
_KEPT = ("samples",)  # what models wrote, which may look like anything


class PathHider:
    """Replaces paths by the names of their files.

    Args:
        report: Whose config names paths.
        more: Further paths that must not be seen.
    """

    def __init__(self, report: Mapping[str, Any], more: Iterable[str | Path]) -> None:
        known = {str(path) for path in more} | set(_paths(report.get("config")))
        known |= {str(Path.home())}
        self._known = sorted((k for k in known if len(k) > 1), key=len, reverse=True)

    def report(self, data: Any) -> Any:
        """Return a report, or a part of one, without paths and hosts anywhere."""
        if isinstance(data, Mapping):
            found: dict[str, Any] = {}
            for key, value in data.items():
                if key in _DROPPED:
                    continue
                name = own = self._anywhere(str(key))
                while name in found:  # files of one name in several folders
                    name = f"{own} ({len(found)})"
                found[name] = value if key in _KEPT else self.report(value)
            return found
        if isinstance(data, (list, tuple)):
            return [self.report(value) for value in data]
        return self._anywhere(data) if isinstance(data, str) else data

    def file(self, data: Any) -> Any:
        """Return the data of a config file; a text is changed only if it is a path."""
        if isinstance(data, Mapping):
            return {key: self.file(value) for key, value in data.items()}
        if isinstance(data, list):
            return [self.file(value) for value in data]
        if isinstance(data, str) and (_ABSOLUTE.fullmatch(data) or data in self._known):
            return _name(data)
        return data

    def _anywhere(self, text: str) -> str:
        for path in self._known:
            text = text.replace(path, _name(path))
        return _ABSOLUTE.sub(lambda found: _name(found[0]), text)


def _name(path: str) -> str:
    """Return what comes after the last separator, of whichever system."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _paths(data: Any) -> Iterator[str]:
    """Yield all absolute paths in a config."""
    if isinstance(data, Mapping):
        for value in data.values():
            yield from _paths(value)
    elif isinstance(data, (list, tuple)):
        for value in data:
            yield from _paths(value)
    elif isinstance(data, str) and (data.startswith("~") or Path(data).is_absolute()):
        yield data
