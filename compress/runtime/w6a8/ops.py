"""The operations of torch that compute W6A8 layers, ``torch.ops.compress.*``.

On a CUDA device they call kernels, compiled ones or Triton's. Elsewhere, and where no
kernel can run, they compute the same thing in plain torch, and the reason is logged
once (``engines.py``). They allocate torch's own memory only and never wait for the
device, so they can be traced and captured; they have no gradient, and torch says so
when one is wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from compress.core.errors import KernelError
from compress.runtime.w6a8 import cuda, reference
from compress.runtime.w6a8.abi import Kernels
from compress.runtime.w6a8.arguments import Values
from compress.runtime.w6a8.engines import engine_for, triton_engine
from compress.runtime.w6a8.tiles import COLUMNS, TiledWeight, unpack_tiles


@library.custom_op("compress::quant_act", mutates_args=())
def quant_act(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Return int8 codes and float32 scales of inputs, by the rule of ``core/inputs``.

    Args:
        x: float ``[..., K]``.
        group: Columns that share a scale; must divide ``K``.

    Returns:
        int8 ``[M, 128 ceil(K / 128)]``, filled up with zeros, and ``[M, K / group]``.
    """
    rows = x.reshape(-1, x.shape[-1])
    engine = engine_for(rows.device, rows.dtype)
    if isinstance(engine, Kernels):
        return cuda.quantize(engine, Values(rows.contiguous()), group)
    if engine is not None:
        return engine.quantize(rows.contiguous(), group)
    codes, scales = reference.quantize_activations(rows, group)
    filled = torch.nn.functional.pad(codes, (0, -codes.shape[1] % COLUMNS))
    return filled, scales


@quant_act.register_fake
def _(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    columns = x.shape[-1]
    rows = x.numel() // columns
    padded = (columns + COLUMNS - 1) // COLUMNS * COLUMNS
    codes = x.new_empty((rows, padded), dtype=torch.int8)
    return codes, x.new_empty((rows, columns // group), dtype=torch.float32)


@library.custom_op("compress::w6a8_linear", mutates_args=())
def w6a8_linear(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    weight_group: int,
    input_group: int,
) -> Tensor:
    """Return ``x @ W.T + bias`` with ``x`` rounded to int8.

    Args:
        x: float ``[..., columns]``; its type is that of the result.
        tiles: uint8; see ``tiles.TiledWeight``, as for the next.
        scales: float16 or bfloat16.
        bias: float ``[rows]``.
        rows: Of the weight.
        columns: Likewise.
        weight_group: Columns of the weight that share a scale.
        input_group: Columns of ``x`` that share a scale.

    Returns:
        ``[..., rows]``.
    """
    _check(x, columns, tiles, scales, bias)
    weight = TiledWeight(tiles, scales, (rows, columns), weight_group)
    flat = x.reshape(-1, columns)
    engine = engine_for(flat.device, flat.dtype)
    own = None if bias is None else bias.to(x.dtype).contiguous()
    if isinstance(engine, Kernels):
        values = Values(flat.contiguous())
        y = cuda.linear(engine, values, weight, own, group=input_group)
    elif engine is not None:
        inputs = engine.quantize(flat.contiguous(), input_group)
        y = engine.linear(inputs, weight, own, dtype=x.dtype)
    else:
        codes = unpack_tiles(tiles, weight.shape), scales[:, :rows].t()
        inputs = reference.quantize_activations(flat, input_group)
        y = reference.linear(inputs, codes, bias, dtype=x.dtype)
    return y.view(*x.shape[:-1], rows)


@w6a8_linear.register_fake
def _(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    weight_group: int,
    input_group: int,
) -> Tensor:
    _check(x, columns, tiles, scales, bias)
    return x.new_empty((*x.shape[:-1], rows))


@library.custom_op("compress::w6a8_matmul", mutates_args=())
def w6a8_matmul(
    codes: Tensor,
    input_scales: Tensor,
    tiles: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    weight_group: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return what ``w6a8_linear`` returns, of inputs that are rounded already.

    Args:
        codes: int8 ``[M, 128 ceil(columns / 128)]``, filled up with zeros.
        input_scales: float32 ``[M, columns / input group]``.
        tiles: uint8; see ``tiles.TiledWeight``, as for the next.
        scales: float16 or bfloat16.
        bias: float ``[rows]``.
        rows: Of the weight.
        columns: Likewise.
        weight_group: Columns of the weight that share a scale.
        dtype: Of the result.

    Returns:
        ``[M, rows]``.
    """
    _check(codes[:, :columns], columns, input_scales, tiles, scales, bias)
    weight = TiledWeight(tiles, scales, (rows, columns), weight_group)
    engine = engine_for(codes.device, dtype)
    if engine is None:
        inputs = codes[:, :columns], input_scales
        stored = unpack_tiles(tiles, weight.shape), scales[:, :rows].t()
        return reference.linear(inputs, stored, bias, dtype=dtype)
    own = None if bias is None else bias.to(dtype).contiguous()
    inputs = codes.contiguous(), input_scales.contiguous()
    if isinstance(engine, Kernels):
        return cuda.linear_of_codes(engine, inputs, weight, own, dtype=dtype)
    return engine.linear(inputs, weight, own, dtype=dtype)


@w6a8_matmul.register_fake
def _(
    codes: Tensor,
    input_scales: Tensor,
    tiles: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    weight_group: int,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty((codes.shape[0], rows), dtype=dtype)


@library.custom_op("compress::w6_decode", mutates_args=())
def w6_decode(
    tiles: Tensor,
    scales: Tensor,
    rows: int,
    columns: int,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weight that codes stand for, computed in float32 and rounded once.

    Args:
        tiles: uint8; see ``tiles.TiledWeight``, as for the next.
        scales: float16 or bfloat16.
        rows: Of the weight.
        columns: Likewise.
        group: Columns that share a scale.
        dtype: Of the result.

    Returns:
        ``[rows, columns]``.
    """
    weight = TiledWeight(tiles, scales, (rows, columns), group)
    engine = triton_engine(tiles.device, dtype)  # no compiled kernel does this
    if engine is not None:
        return engine.decode(weight, dtype=dtype)
    codes = unpack_tiles(tiles, weight.shape).float()
    scale = scales[:, :rows].t().float().repeat_interleave(group, 1)
    return (codes * scale).to(dtype)


@w6_decode.register_fake
def _(
    tiles: Tensor,
    scales: Tensor,
    rows: int,
    columns: int,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    return tiles.new_empty((rows, columns), dtype=dtype)


def _check(x: Tensor, columns: int, *others: Tensor | None) -> None:
    """Raise unless a kernel may take the pointers of these tensors."""
    if x.shape[-1] != columns:
        raise KernelError(
            f"inputs have {x.shape[-1]} columns, the weight has {columns}"
        )
    for other in others:
        if other is not None and other.device != x.device:
            raise KernelError(
                f"inputs are on {x.device}, the layer is on {other.device}; move one"
            )
