"""The operations ``compress::quant_act`` and ``compress::w6a8_linear`` of torch.

On a CUDA device they call the kernels. Elsewhere, and where the kernels cannot run,
they compute the same thing in plain torch, and the reason is logged once. They allocate
torch's own memory only and never wait for the device, so they can be traced and
captured; they have no gradient, and torch says so when one is wanted.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor, library

from compress.core.errors import KernelError
from compress.runtime.w6a8 import cuda, reference
from compress.runtime.w6a8.abi import DTYPES, Kernels, kernels_of
from compress.runtime.w6a8.tiles import COLUMNS, TiledWeight, unpack_tiles

_LOG = logging.getLogger(__name__)


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
    kernels = _kernels_for(rows)
    if kernels is not None:
        return cuda.quantize(kernels, rows.contiguous(), group)
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
    kernels = _kernels_for(flat)
    if kernels is not None:
        own = None if bias is None else bias.to(x.dtype).contiguous()
        y = cuda.linear(kernels, flat.contiguous(), weight, own, group=input_group)
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


def _kernels_for(x: Tensor) -> Kernels | None:
    """Return the kernels that take ``x``; if none do, say why, once."""
    found = available(x.device, x.dtype)
    if isinstance(found, Kernels):
        return found
    _say(str(found))
    return None


def available(device: torch.device, dtype: torch.dtype) -> Kernels | KernelError:
    """Return the kernels for inputs, or why there are none.

    Args:
        device: Of the inputs.
        dtype: Likewise.
    """
    if device.type != "cuda":
        return KernelError(f"the model is on {device.type}, the kernels need CUDA")
    if torch.version.hip is not None:
        return KernelError("this is torch for ROCm, the kernels need CUDA")
    if dtype not in DTYPES:
        return KernelError(f"inputs are {dtype}, not float32, float16 or bfloat16")
    index = torch.cuda.current_device() if device.index is None else device.index
    return kernels_of(index)


@cache
def _say(reason: str) -> None:
    _LOG.warning("W6A8 layers are computed in plain torch, which is slow: %s", reason)
