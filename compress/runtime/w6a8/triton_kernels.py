"""W6A8 kernels in Triton, for CUDA devices without a compiler beside them.

They read the same tiles as the compiled kernels (``tiles.py``), so a layer need not
know which of the two computes it. A tensor of bytes ``4 q`` is put together from the
planes by addresses alone: each byte of the nibble plane is read for two rows, each byte
of the pair plane for four codes; the caches serve the repeats. Rows of the weight are
the first operand of the tensor cores, so few tokens waste little.

Differs from the plan to keep a second, plainer layout for Triton: one copy of the
weights serves both, at the price of reading bytes instead of words.

Imported only where Triton is wanted: this module needs it. ``triton_calls`` launches
what is here. The launches forbid fused multiply-add: codes must be those of the rule in
``core/inputs.py``, whose product is rounded before it is rounded to an integer.
"""

from __future__ import annotations

import triton
import triton.language as tl

_MOST_FINITE = tl.constexpr(3.4028234663852886e38)
_LEAST_NORMAL = tl.constexpr(1.1754943508222875e-38)
_INTEGERS = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds, ties to even


@triton.jit  # type: ignore[untyped-decorator]
def _bytes_of(tiles, rows, columns, mask, across, PANEL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return int8 ``4 q`` of ``rows [N, 1]`` and ``columns [1, K]``.

    Tiles of the same columns lie together for ``PANEL`` rows.
    """
    panel = (rows // PANEL).to(tl.int64) * across + columns // 128
    tile = panel * (PANEL // 16) + rows % PANEL // 16
    half = rows // 8 % 2  # rows r and r + 8 share bytes
    step = columns // 32 % 4
    later = columns // 16 % 2  # columns 16 on share bytes of the pair plane
    lane = rows % 8 * 4 + columns // 4 % 4
    start = tiles + tile * 1536 + lane * 16 + columns % 4
    word = step * 2 + later
    nibbles = tl.load(start + word // 4 * 512 + word % 4 * 4, mask=mask, other=0)
    pairs = tl.load(start + 1024 + step * 4, mask=mask, other=0)
    nibbles, pairs = nibbles.to(tl.int32), pairs.to(tl.int32)
    high = (nibbles << half * 4) & 0xF0
    low = (pairs << 2 >> (half * 2 + later * 4)) & 0x0C
    return (high | low).to(tl.int8)


@triton.jit  # type: ignore[untyped-decorator]
def linear_kernel(  # type: ignore[no-untyped-def]
    codes,  # int8 [M, 128 across]
    input_scales,  # float32 [M, G]
    tiles,  # uint8, see tiles.py
    scales,  # float16 or bfloat16 [G', padded_rows]
    bias,  # [N], or anything if HAS_BIAS is false
    outputs,  # [M, N], or float32 [splits, M, N] if there are several
    tokens,
    rows,
    padded_rows,
    across,
    run_of_split,  # tiles of columns that a split does
    input_groups,
    input_group,
    weight_groups,
    weight_group,
    HAS_BIAS: tl.constexpr,
    FLUSH: tl.constexpr,  # scales change along the columns
    RUN: tl.constexpr,  # columns of a product: 32, 64 or 128
    PANEL: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Compute a block of ``inputs @ weight.T``, or one split's part of it."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    split = tl.program_id(2)
    has_row, has_token = row < padded_rows, token < tokens
    from_token = token.to(tl.int64)
    total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    sums = tl.zeros((ROWS, TOKENS), dtype=tl.int32)
    first = split * run_of_split
    last = tl.minimum(first + run_of_split, across)
    for start in range(first * 128, last * 128, RUN):
        column = start + tl.arange(0, RUN)
        weight = _bytes_of(
            tiles, row[:, None], column[None, :], has_row[:, None], across, PANEL
        )
        inputs = tl.load(
            codes + from_token[None, :] * (across * 128) + column[:, None],
            mask=has_token[None, :],
            other=0,
        )
        if FLUSH:
            sums = tl.dot(weight, inputs, out_dtype=tl.int32)
            # Beyond the columns codes are zero, and any scale will do.
            group = tl.minimum(start // input_group, input_groups - 1)
            of_inputs = tl.load(
                input_scales + from_token * input_groups + group,
                mask=has_token,
                other=0.0,
            )
            group = tl.minimum(start // weight_group, weight_groups - 1)
            of_weights = tl.load(
                scales + group * padded_rows + row, mask=has_row, other=0.0
            ).to(tl.float32)
            scaled = sums.to(tl.float32) * of_inputs[None, :]
            total += scaled * (of_weights * 0.25)[:, None]
        else:
            sums = tl.dot(weight, inputs, acc=sums, out_dtype=tl.int32)
    if not FLUSH:
        of_inputs = tl.load(input_scales + from_token, mask=has_token, other=0.0)
        of_weights = tl.load(scales + row, mask=has_row, other=0.0).to(tl.float32)
        scaled = sums.to(tl.float32) * of_inputs[None, :]
        total = scaled * (of_weights * 0.25)[:, None]
    if HAS_BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    place = (split.to(tl.int64) * tokens + from_token[None, :]) * rows + row[:, None]
    tl.store(
        outputs + place,
        total.to(outputs.dtype.element_ty),
        mask=(row < rows)[:, None] & has_token[None, :],
    )


@triton.jit  # type: ignore[untyped-decorator]
def decode_kernel(  # type: ignore[no-untyped-def]
    tiles,
    scales,
    outputs,  # [N, K]
    rows,
    padded_rows,
    columns,
    across,
    group,
    PANEL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the values of a block of codes."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (column < columns)
    fourfold = _bytes_of(tiles, row, column, mask, across, PANEL).to(tl.float32)
    place = (column // group).to(tl.int64) * padded_rows + row
    scale = tl.load(scales + place, mask=mask, other=0.0).to(tl.float32)
    values = fourfold * 0.25 * scale
    tl.store(
        outputs + row.to(tl.int64) * columns + column,
        values.to(outputs.dtype.element_ty),
        mask=mask,
    )


@triton.jit
def _codes_of(values, most, bad):  # type: ignore[no-untyped-def]
    """Return integers in float32, and scales, by the rule of ``core/inputs.py``.

    ``most`` and ``bad`` must have the shape that ``values`` are multiplied by.
    """
    level = tl.zeros_like(most) + 127.0
    is_usable = most >= _LEAST_NORMAL
    safe = tl.where(is_usable, most, 1.0)
    inverse = tl.where(is_usable, tl.div_rn(level, safe), 0.0)
    scale = tl.where(is_usable, tl.div_rn(safe, level), 0.0)
    scaled = tl.where(bad > 0, 0.0, values * inverse)
    rounded = scaled + _INTEGERS - _INTEGERS
    rounded = tl.minimum(tl.maximum(rounded, -127.0), 127.0)
    return rounded, tl.where(bad > 0, float("nan"), scale)


@triton.jit  # type: ignore[untyped-decorator]
def _store_codes(  # type: ignore[no-untyped-def]
    values,  # float32 [WIDTH], zero beyond the columns
    codes,
    scales,
    row,
    padded,
    groups,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,  # 0 is the whole row
):
    """Round a row to int8 and write codes and scales."""
    column = tl.arange(0, WIDTH)
    size = tl.abs(values)
    is_finite = size <= _MOST_FINITE  # a NaN is not
    bad = tl.where(is_finite, 0, 1)
    size = tl.where(is_finite, size, 0.0)
    values = tl.where(is_finite, values, 0.0)
    if GROUP == 0:
        rounded, scale = _codes_of(values, tl.max(size, 0), tl.max(bad, 0))
        tl.store(scales + row, scale)
    else:
        count: tl.constexpr = WIDTH // GROUP
        most = tl.max(tl.reshape(size, (count, GROUP)), 1)
        worst = tl.max(tl.reshape(bad, (count, GROUP)), 1)
        grouped = tl.reshape(values, (count, GROUP))
        rounded, scale = _codes_of(grouped, most[:, None], worst[:, None])
        rounded = tl.reshape(rounded, (WIDTH,))
        number = tl.arange(0, count)
        scale = tl.reshape(scale, (count,))
        tl.store(scales + row * groups + number, scale, mask=number < groups)
    tl.store(codes + row * padded + column, rounded.to(tl.int8), mask=column < padded)


@triton.jit  # type: ignore[untyped-decorator]
def quantize_kernel(  # type: ignore[no-untyped-def]
    inputs,  # [M, K]
    codes,
    scales,
    columns,
    padded,
    groups,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Round a row of inputs."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    values = tl.load(inputs + row * columns + column, mask=column < columns, other=0.0)
    _store_codes(
        values.to(tl.float32), codes, scales, row, padded, groups, WIDTH, GROUP
    )


@triton.jit  # type: ignore[untyped-decorator]
def rms_norm_kernel(  # type: ignore[no-untyped-def]
    inputs,  # [M, K]
    weight,  # [K], of the inputs' type
    codes,
    scales,
    eps,
    columns,
    padded,
    groups,
    PLUS_ONE: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Round the norm of a row of inputs."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    mask = column < columns
    values = tl.load(inputs + row * columns + column, mask=mask, other=0.0)
    scale = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    wide = values.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / columns + eps)
    dtype: tl.constexpr = inputs.dtype.element_ty
    if PLUS_ONE:
        normed = normed * (1.0 + scale)
    else:
        normed = scale * normed.to(dtype).to(tl.float32)
    normed = tl.where(mask, normed.to(dtype).to(tl.float32), 0.0)
    _store_codes(normed, codes, scales, row, padded, groups, WIDTH, GROUP)


@triton.jit  # type: ignore[untyped-decorator]
def silu_mul_kernel(  # type: ignore[no-untyped-def]
    inputs,  # [M, 2 K], gate first
    codes,
    scales,
    columns,
    padded,
    groups,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Round ``silu(gate) * up`` of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    mask = column < columns
    start = inputs + row * 2 * columns + column
    gate = tl.load(start, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(start + columns, mask=mask, other=0.0).to(tl.float32)
    dtype: tl.constexpr = inputs.dtype.element_ty
    opened = tl.div_rn(gate, 1.0 + tl.exp(-gate)).to(dtype).to(tl.float32)
    product = (opened * up).to(dtype).to(tl.float32)
    _store_codes(product, codes, scales, row, padded, groups, WIDTH, GROUP)
