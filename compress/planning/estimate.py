"""Peak memory and time of a run, predicted from shapes and a few short timings.

Both are predictions for the CPU; the report prints them beside what was measured. How
they come about: :mod:`compress.planning.memory`, :mod:`compress.planning.duration`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from compress.core.artifact import ModelDescription
from compress.core.plan import LayerPlan, Plan
from compress.planning.duration import seconds
from compress.planning.memory import peak_bytes
from compress.planning.shapes import Shapes, Work

__all__ = ["Estimate", "Work", "estimate"]


@dataclass(frozen=True)
class Estimate:
    """Predicted peak memory of the process, and seconds of the run."""

    peak_memory_bytes: int
    seconds: float


def estimate(
    model: ModelDescription,
    plan: Plan,
    work: Work,
    *,
    method_seconds: Callable[[LayerPlan], float],
    dtype: torch.dtype = torch.float32,
) -> Estimate:
    """Return the prediction for a run of ``plan`` on the CPU.

    Args:
        model: What is compressed.
        plan: How.
        work: What else the run does.
        method_seconds: Time that a layer's method takes for one weight, such as
            :func:`compress.planning.duration.method_seconds` measures.
        dtype: Arithmetic of the blocks while statistics are taken.
    """
    shapes = Shapes.of(model, plan)
    return Estimate(
        peak_bytes(shapes, work, dtype=dtype),
        seconds(shapes, work, method_seconds=method_seconds, dtype=dtype),
    )
