"""How long the stages of a run take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the time of a block of code to that of a stage."""
    started = time.perf_counter()
    yield
    spent = time.perf_counter() - started
    seconds[stage] = seconds.get(stage, 0.0) + spent
