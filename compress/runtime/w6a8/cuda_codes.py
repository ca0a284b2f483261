"""The compiled linear layer on inputs that are rounded already."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.runtime.w6a8.abi import Kernels
from compress.runtime.w6a8.cuda import linear_arguments
from compress.runtime.w6a8.schedule import schedule
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
    down, across, _ = weight.tiles.shape
    processors = torch.cuda.get_device_properties(codes.device).multi_processor_count
    cut = schedule(len(codes), down, across, processors)
    group = columns // scales.shape[1]
    arguments = linear_arguments(codes, scales, weight, outputs, cut, group)
    arguments.bias = bias.data_ptr() if bias is not None else None
    if cut.splits > 1:
        partial = torch.empty(cut.splits * len(codes) * rows, device=codes.device)
        tickets = torch.zeros(cut.blocks, dtype=torch.int32, device=codes.device)
        arguments.partial, arguments.tickets = partial.data_ptr(), tickets.data_ptr()
    with torch.cuda.device(codes.device):
        kernels.linear(arguments, torch.cuda.current_stream().cuda_stream)
    return outputs
