"""Peak resident memory of a run on the CPU, from the tensors that live at once.

Each stage is a sum over what its busiest moment holds, in elements and bytes; the peak
is the process itself plus the largest stage. Where a number is no obvious count, its
origin is beside it. llama.cpp runs in a process of its own and is not counted.

Beside that there is what glibc keeps. Tensors below 32 MiB come from its heap, which
calibration leaves full of holes: with 1.1 billion parameters on 16 x 256 tokens 1.1 GiB
more than is ever in use at once, and the stages after it start from there.
MALLOC_MMAP_THRESHOLD_=4194304 in the environment gives it back, for more page faults:
on four blocks of SmolLM2-135M a peak of 1036 MiB instead of 1344, and 11 % more time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from compress.core.plan import LayerPlan
from compress.model.devices import numbers_at_once
from compress.planning.shapes import (
    Shapes,
    Work,
    searched_values,
    stacked_shape,
    weights_of,
)

# Interpreter, torch and transformers: measured 375 MiB, 440 MiB with a tokenizer.
PROCESS_BYTES = 400 << 20
_FLOAT = 4
# Hidden states of one model that an evaluation holds (evaluation/measure.py).
_EVALUATION_STATES_BYTES = 1 << 29
# Verification compares on 4 windows of 256 tokens (exporting.py).
_VERIFY = (4, 256)
# Tensors [n, V] that comparing distributions holds (evaluation/divergence.py).
COMPARED = 5
# Matrices [C, C] and [R, C] while GPTQ factors: H, drift, H shrunk, its factor, that
# turned, a unit matrix and the inverse; the layers stacked, and the target.
_FACTORING = (7, 2)
# And while it rounds: H, drift, H shrunk, the inverse factor; beside those of the
# layers the columns as rows, their scales, levels, errors, and levels turned back.
_SOLVING = (4, 7)

# The largest tensors that glibc takes from its heap, and how much of them it keeps in
# holes, fitted to the two runs above.
_HEAP_BYTES = 32 << 20
KEPT = 2


def peak_bytes(shapes: Shapes, work: Work, *, dtype: torch.dtype) -> int:
    """Return the prediction for the whole process.

    Args:
        shapes: Of model and plan.
        work: What the run does.
        dtype: Arithmetic of the blocks while statistics are taken.
    """
    stages, kept = [_rounding(shapes), exported(shapes)], 0
    if work.calibration:
        width = dtype.itemsize
        in_use, kept = _calibrated(shapes, work.calibration, work.drift, width)
        stages.append(in_use)
    if work.evaluation[0]:
        stages.append(compared(shapes, work.evaluation))
    if work.generated:
        stages.append(_FLOAT * shapes.parameters)
    if work.verified:
        stages.append(verified(shapes, work))
    return PROCESS_BYTES + kept + max(stages)


def windows_that_fit(
    shapes: Shapes, work: Work, *, dtype: torch.dtype, limit_bytes: int
) -> int:
    """Return how many calibration windows a block may see at once under a limit.

    All others lie in a file meanwhile, which takes no memory.

    Args:
        shapes: Of model and plan.
        work: With calibration.
        dtype: Arithmetic of the blocks.
        limit_bytes: Of the process.

    Returns:
        At most those that there are; 0 if not even one of them fits.
    """
    assert work.calibration is not None
    count, length = work.calibration
    low, high = 0, count
    while low < high:
        middle = (low + high + 1) // 2
        part = replace(work, calibration=(middle, length))
        fits = peak_bytes(shapes, part, dtype=dtype) <= limit_bytes
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def _rounding(shapes: Shapes) -> int:
    """Layers without data, and the codes of a block."""
    inside = max((_stack(shapes, stack) for stack in shapes.inside), default=0)
    outside = max((_stack(shapes, [layer]) for layer in shapes.outside), default=0)
    return max(inside + _codes(shapes), outside)


def _stack(shapes: Shapes, layers: Sequence[LayerPlan]) -> int:
    """The stored weights of a stack, and what is made of them.

    First the stack as floats, its levels and codes. Then the codes once more, split by
    layer, all values, and one layer as floats, its error and the square of that.
    """
    weights, largest = weights_of(*layers), max(map(weights_of, layers))
    coding = ((2 + 2 * searched_values(layers)) * _FLOAT + 1) * weights
    comparing = (_FLOAT + 2) * weights + 3 * _FLOAT * largest
    return shapes.stored_bytes * weights + max(coding, comparing)


def _codes(shapes: Shapes) -> int:
    return sum(weights_of(*stack) for stack in shapes.inside)


def _calibrated(
    shapes: Shapes, calibration: tuple[int, int], drift: bool, width: int
) -> tuple[int, int]:
    """A block, the states of all windows, and its busiest input or product.

    Returns:
        Bytes in use, and those that the allocator keeps when they are free.
    """
    tokens = calibration[0] * calibration[1]
    streams = 2 if drift else 1
    # Of each model, and inside the block the residual, a normed copy and a sum.
    held = [(streams + 3, width * tokens * shapes.hidden)]
    # Its weights, its codes, and the file of the one before.
    held += [
        pair
        for layer in (x for stack in shapes.inside for x in stack)
        for pair in ((1, width * weights_of(layer)), (2, weights_of(layer)))
    ]
    # gate, up and their product; beside them the dense input of the next layer.
    forward = width * tokens * shapes.inner * (streams + 2)
    share = dict(shapes.inputs)
    busiest, kept = 0, 0
    for rows, columns in map(stacked_shape, shapes.inside):
        inputs = int(width * tokens * share.get(columns, 1.0) * columns)
        for squares, matrices in (_FACTORING, _SOLVING):
            solver = [
                (streams, inputs),
                (squares, _FLOAT * columns**2),
                (matrices, _FLOAT * rows * columns),
            ]
            busiest, kept = max(busiest, total(solver)), max(kept, small(solver))
    in_use = total(held) + max(forward, busiest)
    return in_use, int(KEPT * (small(held) + kept))


def total(tensors: Sequence[tuple[int, int]]) -> int:
    """Return the bytes of tensors, given as counts and sizes."""
    return sum(count * size for count, size in tensors)


def small(tensors: Sequence[tuple[int, int]]) -> int:
    """Return the bytes of those among them that come from glibc's heap."""
    return total([(count, size) for count, size in tensors if size < _HEAP_BYTES])


def verified(shapes: Shapes, work: Work) -> int:
    """Return what comparing an export takes, which may be a whole model in memory."""
    whole = _FLOAT * shapes.parameters if work.loads_whole else 0
    return whole + compared(shapes, _VERIFY)


def compared(shapes: Shapes, windows: tuple[int, int]) -> int:
    """Return what two models side by side take: a block, or both heads and logits."""
    count, length = windows
    states = _FLOAT * count * length * shapes.hidden
    states = 3 * min(states, _EVALUATION_STATES_BYTES)
    layers = [layer for stack in shapes.inside for layer in stack]
    largest = max(map(weights_of, layers), default=0)
    block = _FLOAT * (shapes.block + 2 * largest)  # a layer is decoded
    head = shapes.vocabulary * shapes.hidden
    heads = (2 * _FLOAT + shapes.stored_bytes) * head  # the second is being read
    logits = 2 * _FLOAT * length * shapes.vocabulary
    logits += COMPARED * _FLOAT * numbers_at_once("cpu")
    return states + max(block, heads, 2 * _FLOAT * head + logits)


def exported(shapes: Shapes) -> int:
    """Return what an export takes: the largest tensor, in its file and copied."""
    return 2 * shapes.stored_bytes * shapes.largest
