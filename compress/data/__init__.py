"""Small bundled texts for calibration and evaluation; LICENSES.md has the sources."""

from __future__ import annotations

import gzip
from importlib import resources

MIX: dict[str, float] = {
    "prose": 3,
    "dialogue": 2,
    "code": 3,
    "languages": 2,
    "chat": 2,
}
"""Parts of the calibration blend ``mix`` and their weights."""


def read_text(name: str) -> str:
    """Return the bundled text ``name.gz``, byte for byte as it was packed.

    Args:
        name: File name in this folder without ``.gz``.
    """
    packed = resources.files(__name__).joinpath(f"{name}.gz").read_bytes()
    return gzip.decompress(packed).decode("utf-8")
