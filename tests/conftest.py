"""Puts this folder's helper modules on the import path; keeps tests out of the home."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

# Before any test module copies the environment for the processes that it starts.
_CACHE = tempfile.TemporaryDirectory(prefix="compress-tests-")
os.environ["COMPRESS_CACHE"] = _CACHE.name
