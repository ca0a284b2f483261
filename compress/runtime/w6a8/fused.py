"""Operations that make codes of inputs together with what comes before them.

``compress::rms_norm_quant`` is a norm and ``quant_act``; ``compress::silu_mul_quant``
is ``silu(gate) * up`` and ``quant_act``; ``compress::rms_norm_linear`` and
``compress::silu_mul_linear`` are those and the layer, for few tokens in one kernel. In
plain torch they are their parts, bit for bit: each step is rounded to the type of the
model, as the model's own module rounds it. On a CUDA device a kernel does a row in one
go; its sums of squares are added in another order, so a code may differ by one step
where a norm lies on the border of two numbers.

    rms_norm(x) = w * cast(x / sqrt(mean(x^2) + eps))          Llama, Mistral, Qwen, Phi
    rms_norm(x) = cast(x / sqrt(mean(x^2) + eps) * (1 + w))    Gemma
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from compress.core.errors import KernelError
from compress.runtime.w6a8 import cuda
from compress.runtime.w6a8.abi import Kernels
from compress.runtime.w6a8.arguments import Values
from compress.runtime.w6a8.engines import engine_for
from compress.runtime.w6a8.ops import quant_act, w6a8_matmul
from compress.runtime.w6a8.tiles import COLUMNS, TiledWeight


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool) -> Tensor:
    """Return the norm of the last dimension, as transformers' modules compute it.

    Args:
        x: float ``[..., K]``.
        weight: float ``[K]``.
        eps: Added to the mean of squares.
        plus_one: Gemma's form.

    Returns:
        ``[..., K]``, of the type of :func:`norm_dtype`.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if plus_one:
        return (normed * (1.0 + weight.float())).to(x.dtype)
    return weight * normed.to(x.dtype)


def norm_dtype(x: Tensor, weight: Tensor, *, plus_one: bool) -> torch.dtype:
    """Return the type of a norm's result: a float32 weight may widen Llama's form."""
    return x.dtype if plus_one else torch.promote_types(x.dtype, weight.dtype)


@library.custom_op("compress::rms_norm_quant", mutates_args=())
def rms_norm_quant(
    x: Tensor, weight: Tensor, eps: float, plus_one: bool, group: int
) -> tuple[Tensor, Tensor]:
    """Return int8 codes and float32 scales of a norm's result.

    Args:
        x: float ``[..., K]``.
        weight: float ``[K]``.
        eps: Added to the mean of squares.
        plus_one: Whether ``1 + weight`` is meant; see the module.
        group: Columns that share a scale; must divide ``K``.

    Returns:
        int8 ``[M, 128 ceil(K / 128)]``, filled up with zeros, and ``[M, K / group]``.
    """
    _check(x, weight)
    engine = engine_for(x.device, x.dtype) if weight.dtype == x.dtype else None
    if isinstance(engine, Kernels):
        return cuda.quantize(engine, _normed(x, weight, eps, plus_one), group)
    if engine is not None:
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        return engine.rms_norm_quantize(flat, weight, eps, group, plus_one=plus_one)
    codes, scales = quant_act(rms_norm(x, weight, eps, plus_one=plus_one), group)
    return codes, scales


@rms_norm_quant.register_fake
def _(
    x: Tensor, weight: Tensor, eps: float, plus_one: bool, group: int
) -> tuple[Tensor, Tensor]:
    return _empty(x, x.shape[-1], group)


@library.custom_op("compress::silu_mul_quant", mutates_args=())
def silu_mul_quant(gate_up: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Return int8 codes and float32 scales of ``silu(gate) * up``.

    Args:
        gate_up: float ``[..., 2 I]``, gate first.
        group: Columns that share a scale; must divide ``I``.

    Returns:
        int8 ``[M, 128 ceil(I / 128)]``, filled up with zeros, and ``[M, I / group]``.
    """
    engine = engine_for(gate_up.device, gate_up.dtype)
    if isinstance(engine, Kernels):
        return cuda.quantize(engine, _gated(gate_up), group)
    if engine is not None:
        flat = gate_up.reshape(-1, gate_up.shape[-1]).contiguous()
        return engine.silu_mul_quantize(flat, group)
    gate, up = gate_up.chunk(2, -1)
    codes, scales = quant_act(torch.nn.functional.silu(gate) * up, group)
    return codes, scales


@silu_mul_quant.register_fake
def _(gate_up: Tensor, group: int) -> tuple[Tensor, Tensor]:
    return _empty(gate_up, gate_up.shape[-1] // 2, group)


@library.custom_op("compress::rms_norm_linear", mutates_args=())
def rms_norm_linear(
    x: Tensor,
    norm: Tensor,
    eps: float,
    plus_one: bool,
    tiles: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    weight_group: int,
    input_group: int,
) -> Tensor:
    """Return ``rms_norm(x) @ W.T + bias`` with the norm's result rounded to int8.

    Args:
        x: float ``[..., columns]``.
        norm: float ``[columns]``.
        eps: Added to the mean of squares.
        plus_one: Whether ``1 + norm`` is meant; see the module.
        tiles: See ``ops.w6a8_linear``, as for the rest.
        scales: float16 or bfloat16.
        bias: float ``[rows]``.
        rows: Of the weight.
        columns: Likewise.
        weight_group: Columns of the weight that share a scale.
        input_group: Columns of the norm's result that share a scale.

    Returns:
        ``[..., rows]``, of the type of :func:`norm_dtype`.
    """
    _check(x, norm)
    dtype = norm_dtype(x, norm, plus_one=plus_one)
    engine = engine_for(x.device, x.dtype) if norm.dtype == x.dtype else None
    if isinstance(engine, Kernels):
        weight = TiledWeight(tiles, scales, (rows, columns), weight_group)
        own = None if bias is None else bias.to(x.dtype).contiguous()
        values = _normed(x, norm, eps, plus_one)
        y = cuda.linear(engine, values, weight, own, group=input_group)
    else:
        codes, scale = rms_norm_quant(x, norm, eps, plus_one, input_group)
        y = w6a8_matmul(
            *(codes, scale, tiles, scales, bias),
            *(rows, columns, weight_group, dtype),
        )
    return y.view(*x.shape[:-1], rows)


@rms_norm_linear.register_fake
def _(
    x: Tensor,
    norm: Tensor,
    eps: float,
    plus_one: bool,
    tiles: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    weight_group: int,
    input_group: int,
) -> Tensor:
    dtype = norm_dtype(x, norm, plus_one=plus_one)
    return x.new_empty((*x.shape[:-1], rows), dtype=dtype)


@library.custom_op("compress::silu_mul_linear", mutates_args=())
def silu_mul_linear(
    gate_up: Tensor,
    tiles: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    weight_group: int,
    input_group: int,
) -> Tensor:
    """Return ``(silu(gate) * up) @ W.T + bias`` with the product rounded to int8.

    Args:
        gate_up: float ``[..., 2 columns]``, gate first.
        tiles: See ``ops.w6a8_linear``, as for the rest.
        scales: float16 or bfloat16.
        bias: float ``[rows]``.
        rows: Of the weight.
        columns: Likewise.
        weight_group: Columns of the weight that share a scale.
        input_group: Columns of the product that share a scale.

    Returns:
        ``[..., rows]``.
    """
    engine = engine_for(gate_up.device, gate_up.dtype)
    if isinstance(engine, Kernels):
        weight = TiledWeight(tiles, scales, (rows, columns), weight_group)
        own = None if bias is None else bias.to(gate_up.dtype).contiguous()
        y = cuda.linear(engine, _gated(gate_up), weight, own, group=input_group)
    else:
        codes, scale = silu_mul_quant(gate_up, input_group)
        y = w6a8_matmul(
            *(codes, scale, tiles, scales, bias),
            *(rows, columns, weight_group, gate_up.dtype),
        )
    return y.view(*gate_up.shape[:-1], rows)


@silu_mul_linear.register_fake
def _(
    gate_up: Tensor,
    tiles: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    weight_group: int,
    input_group: int,
) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], rows))


def _check(x: Tensor, norm: Tensor) -> None:
    if norm.device != x.device:
        raise KernelError(
            f"inputs are on {x.device}, the norm is on {norm.device}; move one"
        )


def _normed(x: Tensor, norm: Tensor, eps: float, plus_one: bool) -> Values:
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    kind = "norm_plus_one" if plus_one else "norm"
    return Values(flat, kind, norm.contiguous(), eps)


def _gated(gate_up: Tensor) -> Values:
    return Values(gate_up.reshape(-1, gate_up.shape[-1]).contiguous(), "gated")


def _empty(x: Tensor, columns: int, group: int) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    padded = (columns + COLUMNS - 1) // COLUMNS * COLUMNS
    codes = x.new_empty((rows, padded), dtype=torch.int8)
    return codes, x.new_empty((rows, columns // group), dtype=torch.float32)
