"""Operations that make codes of inputs together with what comes before them.

``compress::rms_norm_quant`` is a norm and ``quant_act``; ``compress::silu_mul_quant``
is ``silu(gate) * up`` and ``quant_act``. In plain torch they are that pair, bit for
bit: each step is rounded to the type of the model, as the model's own module rounds it.
On a CUDA device Triton does a row in one go; its sums of squares are added in another
order, so a code may differ by one step where a norm lies on the border of two numbers.

    rms_norm(x) = w * cast(x / sqrt(mean(x^2) + eps))          Llama, Mistral, Qwen, Phi
    rms_norm(x) = cast(x / sqrt(mean(x^2) + eps) * (1 + w))    Gemma
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from compress.core.errors import KernelError
from compress.runtime.w6a8.engines import triton_engine
from compress.runtime.w6a8.ops import quant_act
from compress.runtime.w6a8.tiles import COLUMNS


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
    if weight.device != x.device:
        raise KernelError(
            f"inputs are on {x.device}, the norm is on {weight.device}; move one"
        )
    engine = triton_engine(x.device, x.dtype)
    if engine is not None and weight.dtype == x.dtype:
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
    engine = triton_engine(gate_up.device, gate_up.dtype)
    if engine is not None:
        flat = gate_up.reshape(-1, gate_up.shape[-1]).contiguous()
        return engine.silu_mul_quantize(flat, group)
    gate, up = gate_up.chunk(2, -1)
    codes, scales = quant_act(torch.nn.functional.silu(gate) * up, group)
    return codes, scales


@silu_mul_quant.register_fake
def _(gate_up: Tensor, group: int) -> tuple[Tensor, Tensor]:
    return _empty(gate_up, gate_up.shape[-1] // 2, group)


def _empty(x: Tensor, columns: int, group: int) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    padded = (columns + COLUMNS - 1) // COLUMNS * COLUMNS
    codes = x.new_empty((rows, padded), dtype=torch.int8)
    return codes, x.new_empty((rows, columns // group), dtype=torch.float32)
