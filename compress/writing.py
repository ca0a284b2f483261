"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

TEMPORARY = ".part"
"""What names of files and folders end with until they are complete."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is either whole or absent, whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # whatever it was, no half file stays behind
        temporary.unlink(missing_ok=True)
        raise
