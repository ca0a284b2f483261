"""Peak memory and time of a run, predicted from shapes and a few short timings.

Both are for the device of the run; the report prints them beside what was measured. How
they come about: :mod:`compress.planning.memory`, :mod:`compress.planning.device`,
:mod:`compress.planning.duration`, :mod:`compress.planning.pruning`,
:mod:`compress.planning.recovery`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from compress.config.recover_section import RecoverOptions
from compress.core.artifact import ModelDescription
from compress.core.plan import LayerPlan, Plan
from compress.planning.device import device_bytes, host_bytes
from compress.planning.duration import seconds, speeds_of
from compress.planning.memory import PROCESS_BYTES, peak_bytes
from compress.planning.pruning import PruneWork, prune_seconds
from compress.planning.pruning_memory import prune_bytes
from compress.planning.recovery import (
    RecoverWork,
    recover_bytes,
    recover_seconds,
    trained_values,
)
from compress.planning.shapes import Shapes, Work

__all__ = [
    "StageEstimate",
    "Work",
    "estimate",
    "estimate_pruning",
    "estimate_recovery",
]


@dataclass(frozen=True)
class StageEstimate:
    """What a run or a stage of it is predicted to take.

    Attributes:
        seconds: Of all of it.
        peak_memory_bytes: Of the process while it runs.
        device_memory_bytes: Of a GPU; 0 on the CPU.
    """

    seconds: float
    peak_memory_bytes: int
    device_memory_bytes: int


def estimate(
    model: ModelDescription,
    plan: Plan,
    work: Work,
    *,
    method_seconds: Callable[[LayerPlan], float],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    in_memory: Work | None = None,
) -> StageEstimate:
    """Return the prediction for a run of ``plan``.

    Args:
        model: What is compressed.
        plan: How.
        work: What else the run does.
        method_seconds: Time that a layer's method takes for one weight, such as
            :func:`compress.planning.duration.method_seconds` measures.
        dtype: Arithmetic of the blocks while statistics are taken.
        device: Where they run.
        in_memory: What of the work lies in memory, if not all does.
    """
    shapes, held = Shapes.of(model, plan), in_memory or work
    taken = seconds(
        shapes, work, method_seconds=method_seconds, dtype=dtype, device=device
    )
    if device == "cpu":
        return StageEstimate(taken, peak_bytes(shapes, held, dtype=dtype), 0)
    host, own = (f(shapes, held, dtype=dtype) for f in (host_bytes, device_bytes))
    return StageEstimate(taken, host, own)


def estimate_pruning(
    model: ModelDescription, work: PruneWork, *, dtype: torch.dtype, device: str
) -> StageEstimate:
    """Return the prediction for a pruning.

    Args:
        model: Dense.
        work: What is done.
        dtype: Arithmetic of the blocks.
        device: Where they run.
    """
    shapes, on_gpu = Shapes.of(model, Plan(model.label, {})), device != "cpu"
    host, own = prune_bytes(shapes, work, dtype=dtype, on_gpu=on_gpu)
    taken = prune_seconds(shapes, work, speeds_of(dtype, device))
    return StageEstimate(taken, PROCESS_BYTES + host, own)


def estimate_recovery(
    student: ModelDescription,
    teacher: ModelDescription,
    options: RecoverOptions,
    *,
    importances: int,
    dtype: torch.dtype,
    device: str,
) -> StageEstimate:
    """Return the prediction for a recovery.

    Args:
        student: The pruned model.
        teacher: The original one.
        options: Of the recovery.
        importances: Tokens that ranks of blocks are measured on.
        dtype: Arithmetic.
        device: Where both models are.
    """
    trained, replaced = trained_values(options, student)
    work = RecoverWork(
        options,
        student=Shapes.of(student, Plan(student.label, {})),
        teacher=Shapes.of(teacher, Plan(teacher.label, {})),
        trained=trained,
        replaced=replaced,
        importances=importances,
    )
    host, own = recover_bytes(work, dtype=dtype, on_gpu=device != "cpu")
    taken = recover_seconds(work, speeds_of(dtype, device))
    return StageEstimate(taken, PROCESS_BYTES + host, own)
