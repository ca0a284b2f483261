"""The compiled linear layer on inputs that are rounded already."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.runtime.w6a8.abi import Kernels
from compress.runtime.w6a8.cuda import cut_of, launch
from compress.runtime.w6a8.tiles import TiledWeight


def linear(
    kernels: Kernels,
    inputs: tuple[Tensor, Tensor],
    weight: TiledWeight,
    bias: Tensor | None,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``inputs @ weight.T + bias`` of codes under scales.

    Args:
        kernels: Of the device.
        inputs: int8 ``[M, 128 ceil(K / 128)]`` and float32 ``[M, K / group]``, both
            contiguous.
        weight: The tiles.
        bias: ``[N]`` of ``dtype``.
        dtype: float32, float16 or bfloat16.

    Returns:
        ``[M, N]``.
    """
    codes, scales = inputs
    rows, columns = weight.shape
    outputs = torch.empty(len(codes), rows, dtype=dtype, device=codes.device)
    if len(codes) == 0:
        return outputs
    group = columns // scales.shape[1] if scales.shape[1] > 1 else None
    cut = cut_of(codes, weight, group, None)
    tickets = None
    if cut.splits > 1:
        tickets = torch.zeros(cut.blocks, dtype=torch.int32, device=codes.device)
    launch(
        kernels, inputs, weight, bias, outputs, cut=cut, group=group, tickets=tickets
    )
    return outputs
