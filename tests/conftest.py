"""Puts this folder's helper modules on the import path; keeps tests out of the home."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

# Before any test module copies the environment for the processes that it starts.
_CACHE = tempfile.TemporaryDirectory(prefix="compress-tests-")
_KERNELS = Path(os.environ.get("COMPRESS_CACHE", "missing")).absolute() / "kernels"
if _KERNELS.is_dir():  # built for minutes, and named by a digest of their sources
    (Path(_CACHE.name) / "kernels").symlink_to(_KERNELS)
os.environ["COMPRESS_CACHE"] = _CACHE.name
if not Path("/dev/nvidia0").exists():
    # Before anything imports Triton, which looks only then.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A busy machine is not a slow strategy: examples still count, seconds do not.
settings.register_profile(
    "busy", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("busy")


@pytest.fixture(autouse=True)
def messages_reach_caplog() -> Iterator[None]:
    """Undo what a command has set up: its own handler, and nothing for the root."""
    yield
    logger = logging.getLogger("compress")
    logger.handlers.clear()
    logger.propagate = True
