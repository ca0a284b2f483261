"""Peak resident memory of a run on the CPU, from the tensors that live at once.

Each stage is a sum over what its busiest moment holds, in elements and bytes; the peak
is the process itself plus the largest stage. Where a number is no obvious count, its
origin is beside it. llama.cpp runs in a process of its own and is not counted.
"""

from __future__ import annotations

import torch

from compress.planning.shapes import Shapes, Work, weights_of

# Interpreter, torch, transformers, a tokenizer of 49 thousand tokens: measured 440 MiB.
_PROCESS_BYTES = 440 << 20
_FLOAT = 4
# Hidden states of one model that an evaluation holds (evaluation/measure.py).
_EVALUATION_STATES_BYTES = 1 << 29
# Verification compares on 4 windows of 256 tokens (exporting.py).
_VERIFY = (4, 256)
# Distributions are compared 256 positions at a time, with five such tensors.
_COMPARED_AT_ONCE = 5 * 256
# Matrices [C, C] while GPTQ solves: H and drift; H shrunk, damped and factored; and in
# the solver H permuted, its factor and the inverse's.
_SQUARES = 8
# Matrices [R, C] then: target, target in the solver's order, scales spread out, codes.
_SOLVER_ROWS = 4


def peak_bytes(shapes: Shapes, work: Work, *, dtype: torch.dtype) -> int:
    """Return the prediction for the whole process.

    Args:
        shapes: Of model and plan.
        work: What the run does.
        dtype: Arithmetic of the blocks.
    """
    width = dtype.itemsize
    stages = [_rounding(shapes), _export(shapes)]
    if work.calibration:
        stages.append(_calibrated(shapes, work.calibration, work.drift, width))
    if work.evaluation[0]:
        stages.append(_comparison(shapes, work.evaluation, width))
    if work.verified:
        whole = _FLOAT * shapes.parameters if work.loads_whole else 0
        stages.append(whole + _comparison(shapes, _VERIFY, width))
    return _PROCESS_BYTES + max(stages)


def _rounding(shapes: Shapes) -> int:
    """A layer without data: weight, its values, their difference and its square."""
    codes = sum(map(weights_of, shapes.inside))
    inside = max(map(weights_of, shapes.inside), default=0)
    outside = max(map(weights_of, shapes.outside), default=0)
    return max(4 * _FLOAT * inside + codes, 4 * _FLOAT * outside + outside)


def _calibrated(
    shapes: Shapes, calibration: tuple[int, int], drift: bool, width: int
) -> int:
    """A block, the states of all windows, and its busiest input or product."""
    tokens = calibration[0] * calibration[1]
    streams = 2 if drift else 1
    codes = sum(map(weights_of, shapes.inside))
    # States go in and out, and inside there are the residual and a normed copy.
    states = width * tokens * shapes.hidden * (streams + 3)
    # gate, up and their product; beside them the dense input of the next layer.
    forward = width * tokens * shapes.inner * (streams + 2)
    share = dict(shapes.inputs)
    solve = max(
        width * tokens * share.get(columns, 1.0) * columns * streams
        + _FLOAT * (_SQUARES * columns**2 + _SOLVER_ROWS * rows * columns)
        for rows, columns in (layer.shape for layer in shapes.inside)
    )
    return int(width * shapes.block + codes + states + max(forward, solve))


def _comparison(shapes: Shapes, windows: tuple[int, int], width: int) -> int:
    """Two models side by side: a block of one, or the heads of both and logits."""
    count, length = windows
    states = width * count * length * shapes.hidden
    states = 3 * min(states, _EVALUATION_STATES_BYTES)
    largest = max(map(weights_of, shapes.inside), default=0)
    block = width * shapes.block + 2 * _FLOAT * largest  # a layer is decoded
    head = shapes.vocabulary * shapes.hidden
    heads = (2 * width + shapes.stored_bytes) * head  # the second is being read
    logits = _FLOAT * shapes.vocabulary * (2 * length + _COMPARED_AT_ONCE)
    return states + max(block, heads, 2 * width * head + logits)


def _export(shapes: Shapes) -> int:
    """The largest tensor, in the mapped file and copied."""
    return 2 * shapes.stored_bytes * shapes.largest
