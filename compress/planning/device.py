"""Memory of a run whose blocks are on a GPU: of the GPU, and of the host beside it.

Counted are tensors in use at once, as ``torch.cuda.max_memory_allocated`` counts them;
what CUDA's own libraries take comes on top, some 0.5 GB. Windows go through a block in
batches, and their states wait in pinned memory of the host if they are large.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compress.core.plan import LayerPlan
from compress.model.devices import numbers_at_once
from compress.model.states import HELD_BYTES, batch_tokens
from compress.planning import memory
from compress.planning.shapes import (
    Shapes,
    Work,
    searched_values,
    stacked_shape,
    weights_of,
)

# Interpreter, torch with its CUDA libraries, and a context: measured on an H200.
PROCESS_BYTES = 1900 << 20
_FLOAT, _DOUBLE = 4, 8
# Float32 matrices [C, C] that GPTQ holds beside sums, weights and target when it
# factors; and those and [R, C] when it looks for scales or goes through columns, of so
# many weights at a time. Counted by torch's dispatcher on matrices of several sizes.
_FACTORING = 6
_SOLVING = (4, 5)
_WEIGHTS_AT_ONCE = 1 << 27
# Blocks read ahead: the next one, and the one before, whose memory stays pinned. torch
# pins powers of two, which for the usual widths is a third more.
_PINNED = 2 * 4 / 3


def device_bytes(shapes: Shapes, work: Work, *, dtype: torch.dtype) -> int:
    """Return the peak of the GPU's memory.

    Args:
        shapes: Of model and plan.
        work: What the run does.
        dtype: Arithmetic of the blocks while statistics are taken.
    """
    stages = [_rounded(x) for x in (*shapes.inside, *((y,) for y in shapes.outside))]
    if work.calibration:
        stages.append(_calibrated(shapes, work, dtype.itemsize))
    if work.evaluation[0]:
        stages.append(_evaluated(shapes, work.evaluation[1]))
    return max(stages, default=0)


def host_bytes(shapes: Shapes, work: Work, *, dtype: torch.dtype) -> int:
    """Return the peak of the process's memory; arguments as of :func:`device_bytes`."""
    ahead = int(_PINNED * shapes.stored_bytes * shapes.block)
    coded = 2 * sum(weights_of(*stack) for stack in shapes.inside)  # one is written
    stages = [ahead + coded, memory.exported(shapes)]
    if work.calibration:
        states = _states(shapes, work.calibration, dtype.itemsize)
        waiting = 0 if states <= HELD_BYTES else states * (1 + work.drift)
        stages.append(waiting + ahead + coded)
    if work.evaluation[0]:
        stages.append(memory.compared(shapes, work.evaluation))
    if work.generated:
        stages.append(_FLOAT * shapes.parameters)
    if work.verified:
        stages.append(memory.verified(shapes, work))
    return PROCESS_BYTES + max(stages)


def batches(shapes: Shapes, work: Work, *, dtype: torch.dtype) -> int:
    """Return in how many batches the windows of a calibration go through a block."""
    assert work.calibration is not None
    count, length = work.calibration
    tokens = batch_tokens(shapes.hidden, shapes.inner, dtype.itemsize, length)
    return -(-count * length // tokens)


def _states(shapes: Shapes, calibration: tuple[int, int], width: int) -> int:
    return width * calibration[0] * calibration[1] * shapes.hidden


def _rounded(layers: Sequence[LayerPlan]) -> int:
    """A stack as stored, and so many floats and codes of it."""
    beside = 34 if searched_values(layers) else 17  # bytes, counted like the above
    return (2 + beside) * weights_of(*layers)


def _calibrated(shapes: Shapes, work: Work, width: int) -> int:
    """The block, states, a batch, and the busiest of sums and solvers."""
    assert work.calibration is not None
    _, length = work.calibration
    streams = 1 + work.drift
    states = _states(shapes, work.calibration, width)
    total = states // (width * shapes.hidden)
    most = batch_tokens(shapes.hidden, shapes.inner, width, length)
    tokens, several = min(total, most), total > most
    # Originals stay beside the new weights while batches of the dense model follow.
    blocks = 1 + (work.drift and several and work.order == "layer")
    held = width * shapes.block * blocks
    if states <= HELD_BYTES:
        held += streams * states
    else:  # the batch that runs and the next, of each stream
        held += 2 * streams * width * tokens * shapes.hidden
    inside = width * tokens * (12 * shapes.hidden + 4 * shapes.inner)
    inputs = shapes.inputs if work.order == "block" else ()
    sums = streams * sum(columns**2 for columns, _ in inputs)
    busiest = _DOUBLE * sums + inside
    for stack in shapes.inside:
        rows, columns = stacked_shape(stack)
        squares = _FLOAT * (sums or streams * columns**2)
        # A layer's own input is kept while it is solved, and what the block adds it to.
        paused = 0 if inputs else width * tokens * (shapes.hidden + columns)
        doubles = 0 if inputs else _DOUBLE * streams * columns**2 + inside
        together = min(rows, max(1, _WEIGHTS_AT_ONCE // columns))
        squared, copies = _SOLVING
        copies += searched_values(stack)
        solving = max(_FACTORING * columns, squared * columns + copies * together)
        solving = _FLOAT * columns * (solving + 2 * rows)
        busiest = max(busiest, doubles, squares + paused + solving)
    return held + busiest


def _evaluated(shapes: Shapes, length: int) -> int:
    """A block in float32 with one layer decoded, or two heads, logits and scores."""
    layers = [layer for stack in shapes.inside for layer in stack]
    largest = max(map(weights_of, layers), default=0)
    inside = 4096 * (3 * shapes.hidden + 3 * shapes.inner)
    heads = 2 * shapes.vocabulary * shapes.hidden
    logits = 2 * length * shapes.vocabulary
    logits += memory.COMPARED * min(numbers_at_once("cuda"), logits // 2)
    return _FLOAT * max(shapes.block + largest + inside, heads + logits)
