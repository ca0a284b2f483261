"""The column loop of error feedback as one Triton kernel, for GPUs.

The loop of ``feedback.round_columns_`` launches nine small kernels a column, which
takes a GPU longer than the arithmetic. Rows do not depend on one another: here each
program holds 128 columns of a few rows in registers and goes through them by itself.
Levels are those of the loop, but for sums that are fused: a number half way between two
levels may go to the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.core.levels import FloatGrid, IntegerGrid
from compress.core.scheme import Scheme, Zero

_ROWS = 16
# Adding and taking away 1.5 * 2^23 rounds a float32 below 2^22 to a whole number, ties
# to even, as torch.round does; there is no such instruction in the language.
_ROUNDER = tl.constexpr(12582912.0)
_EXPONENT_BITS = tl.constexpr(0x7F800000)
_ZEROS = {Zero.NONE: 0, Zero.INTEGER: 1, Zero.OFFSET: 2}


@triton.jit  # type: ignore[untyped-decorator]
def _rounded(steps, lowest, highest, least, unit, is_integer: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the nearest levels; as ``IntegerGrid.round_`` and ``FloatGrid.round_``."""
    clamped = tl.minimum(tl.maximum(steps, lowest), highest)
    if is_integer:
        level = (clamped + _ROUNDER) - _ROUNDER
    else:
        bits = clamped.to(tl.int32, bitcast=True) & _EXPONENT_BITS
        step = tl.maximum(bits.to(tl.float32, bitcast=True), least) * unit
        level = ((tl.div_rn(clamped, step) + _ROUNDER) - _ROUNDER) * step
    return level


@triton.jit  # type: ignore[untyped-decorator]
def _columns(  # type: ignore[no-untyped-def]
    work,
    factor,
    scale,
    zero,
    levels,
    errors,
    rows,
    columns,
    stride,
    lowest,
    highest,
    least,
    unit,
    is_integer: tl.constexpr,
    kind: tl.constexpr,
    width: tl.constexpr,
    height: tl.constexpr,
):
    at = tl.program_id(0) * height + tl.arange(0, height)
    inside = at < rows
    k = tl.arange(0, width)
    here = (k < columns)[:, None] & inside[None, :]
    tile = tl.load(work + k[:, None] * rows + at[None, :], mask=here, other=0.0)
    for i in range(columns):
        place = i * rows + at
        value = tl.sum(tl.where(k[:, None] == i, tile, 0.0), axis=0)
        s = tl.load(scale + place, mask=inside, other=1.0)
        if kind == 0:
            level = _rounded(
                tl.div_rn(value, s), lowest, highest, least, unit, is_integer
            )
            lost = value - level * s
        else:
            z = tl.load(zero + place, mask=inside, other=0.0)
            if kind == 1:
                steps = tl.div_rn(value, s) + z
                level = _rounded(steps, lowest, highest, least, unit, is_integer)
                lost = value - (level - z) * s
            else:
                steps = tl.div_rn(value - z, s)
                level = _rounded(steps, lowest, highest, least, unit, is_integer)
                lost = value - (level * s + z)
        error = tl.div_rn(lost, tl.load(factor + i * stride + i))
        tl.store(levels + place, level, mask=inside)
        tl.store(errors + place, error, mask=inside)
        later = (k > i) & (k < columns)
        owed = tl.load(factor + i * stride + k, mask=later, other=0.0)
        tile -= owed[:, None] * error[None, :]


def has_kernel(work: Tensor, scheme: Scheme) -> bool:
    """Whether :func:`round_columns_` serves these columns on their device."""
    if not isinstance(scheme.levels, (IntegerGrid, FloatGrid)):
        return False
    return torch.cuda.get_device_capability(work.device)[0] >= 7


def round_columns_(
    work: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    scheme: Scheme,
    *,
    levels: Tensor,
    errors: Tensor,
) -> None:
    """Do what ``feedback.round_columns_`` does; ``work`` stays as it is.

    All tensors but ``factor`` are contiguous; its rows are.
    """
    assert factor.stride(1) == 1
    grid = scheme.levels
    is_integer = isinstance(grid, IntegerGrid)
    least, unit = 1.0, 1.0
    if isinstance(grid, FloatGrid):
        least, unit = 2.0**grid.least_exponent, 2.0**-grid.mantissa_bits
    columns, rows = work.shape
    _columns[(triton.cdiv(rows, _ROWS),)](
        work,
        factor,
        scale,
        scale if zero is None else zero,
        levels,
        errors,
        rows,
        columns,
        factor.stride(0),
        float(grid.lowest),
        float(grid.highest),
        least,
        unit,
        is_integer=is_integer,
        kind=_ZEROS[scheme.zero if zero is not None else Zero.NONE],
        width=max(16, triton.next_power_of_2(columns)),
        height=_ROWS,
        num_warps=1,
    )
