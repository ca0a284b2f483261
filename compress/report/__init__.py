"""The report of a run: JSON for programs, Markdown for reviews, one HTML page to read.

``report.json`` is the only source: the two others say the same and nothing else. Each
key is described in ``docs/report.md``; parts that a run did not have may be missing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.core.errors import ExportError
from compress.report.markdown import render_markdown
from compress.report.page import render_page
from compress.report.terminal import summary_table
from compress.report.wording import plain_data

__all__ = ["summary_table", "write_report"]


def write_report(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``report.json``, ``report.md`` and ``report.html`` into ``folder``.

    All three are complete on disk before the first takes its name, so that a full disk
    or a kill never leaves half a report or destroys an older one.

    Args:
        report: As in ``docs/report.md``. NaN and infinities become null.
        folder: Created when missing.

    Returns:
        The three paths, in the order above.

    Raises:
        ExportError: A file could not be written; the older report is untouched.
    """
    data = plain_data(report)
    texts = {
        "report.json": json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False),
        "report.md": render_markdown(data),
        "report.html": render_page(data),
    }
    waiting = {folder / name: folder / f".{name}.{os.getpid()}.tmp" for name in texts}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for temporary, text in zip(waiting.values(), texts.values(), strict=True):
            _write_durably(temporary, text)
        for target, temporary in waiting.items():
            os.replace(temporary, target)
    except OSError as error:
        raise ExportError(
            f"cannot write the report: {error.strerror or error} at "
            f"{error.filename or folder}; free some space and continue with --resume"
        ) from error
    finally:
        for temporary in waiting.values():
            if temporary.is_file():
                temporary.unlink()
    return list(waiting)


def _write_durably(path: Path, text: str) -> None:
    """Write UTF-8 with Unix line ends and wait until it is on the disk."""
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write(text if text.endswith("\n") else text + "\n")
        stream.flush()
        os.fsync(stream.fileno())
