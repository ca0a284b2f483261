"""Small disks to run out of: a tmpfs that is mounted, filled, and made read-only."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path


def can_mount(folder: Path) -> bool:
    """Whether a tmpfs can be mounted below a folder; that takes root."""
    try:
        with small_disk(folder / "probe", 1 << 16):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[Path]:
    """Mount a tmpfs of so many bytes."""
    place.mkdir(parents=True, exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    subprocess.run(["mount", *options], check=True, capture_output=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def remount(place: Path, options: str) -> None:
    """Change a mounted tmpfs."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)
