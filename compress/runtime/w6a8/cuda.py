"""Calls of the kernels on tensors of a CUDA device.

All memory comes from torch's allocator and nothing waits for the device, so calls can
be captured in CUDA graphs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from compress.runtime.w6a8.abi import Kernel, Kernels, QuantizeArguments
from compress.runtime.w6a8.arguments import (
    Values,
    chip_of,
    linear_arguments,
    stream_of,
)
from compress.runtime.w6a8.schedule import (
    Schedule,
    few_pays,
    few_schedule,
    hopper_schedule,
    schedule,
)
from compress.runtime.w6a8.tiles import COLUMNS, TiledWeight, run_of


def quantize(
    kernels: Kernels, values: Values, group: int | None, tickets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return codes and scales of values; codes are filled up to 128 columns with zeros.

    Args:
        kernels: Of the device.
        values: ``[M, K]``.
        group: Columns that share a scale; ``None`` is the whole row.
        tickets: int32 that becomes zeros, for a linear layer that follows.

    Returns:
        int8 ``[M, 128 ceil(K / 128)]`` and float32 ``[M, K / group]``.
    """
    rows, columns, device = values.rows, values.columns, values.inputs.device
    group = group or columns
    padded = -(-columns // COLUMNS) * COLUMNS
    codes = torch.empty(rows, padded, dtype=torch.int8, device=device)
    scales = torch.empty(rows, columns // group, device=device)
    if rows == 0:
        return codes, scales
    arguments = QuantizeArguments(
        values=values.arguments(),
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        tickets=tickets.data_ptr() if tickets is not None else None,
        rows=rows,
        padded=padded,
        group=group,
        ticket_count=tickets.numel() if tickets is not None else 0,
        device=values.inputs.get_device(),
        overlaps=int(chip_of(device).major >= 9),
    )
    with torch.cuda.device(device):
        kernels.quantize(arguments, stream_of(device))
    return codes, scales


def linear(
    kernels: Kernels,
    values: Values,
    weight: TiledWeight,
    bias: Tensor | None,
    *,
    group: int | None,
    kernel: Kernel | None = None,
) -> Tensor:
    """Return ``values @ weight.T + bias`` with values rounded to int8.

    Args:
        kernels: Of the device.
        values: ``[M, K]``.
        weight: The tiles.
        bias: ``[N]`` of the inputs' type.
        group: Columns of values that share a scale; ``None`` is the whole row.
        kernel: Which to use; ``None`` chooses by device and size.

    Returns:
        ``[M, N]`` of the inputs' type.
    """
    inputs, rows = values.inputs, weight.shape[0]
    outputs = torch.empty(values.rows, rows, dtype=inputs.dtype, device=inputs.device)
    if values.rows == 0:
        return outputs
    group = group if group is not None and group < values.columns else None
    cut = cut_of(values.rows, inputs.device, weight, group, kernel)
    tickets = None
    if cut.splits > 1:
        tickets = torch.empty(cut.blocks, dtype=torch.int32, device=inputs.device)
    coded = quantize(kernels, values, group, tickets)
    launch(kernels, coded, weight, bias, outputs, cut=cut, group=group, tickets=tickets)
    return outputs


def linear_of_codes(
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
    cut = cut_of(len(codes), codes.device, weight, group, None)
    tickets = None
    if cut.splits > 1:
        tickets = torch.zeros(cut.blocks, dtype=torch.int32, device=codes.device)
    launch(
        kernels, inputs, weight, bias, outputs, cut=cut, group=group, tickets=tickets
    )
    return outputs


def launch(
    kernels: Kernels,
    inputs: tuple[Tensor, Tensor],
    weight: TiledWeight,
    bias: Tensor | None,
    outputs: Tensor,
    *,
    cut: Schedule,
    group: int | None,
    tickets: Tensor | None,
) -> None:
    """Start the product of inputs that are rounded already.

    Args:
        kernels: Of the device.
        inputs: Codes and scales, as of :func:`quantize`.
        weight: The tiles.
        bias: ``[N]`` of the outputs' type.
        outputs: ``[M, N]``, written.
        cut: See :func:`cut_of`.
        group: Columns of inputs that share a scale; ``None`` is the whole row.
        tickets: int32 zeros ``[cut.blocks]``, if columns are split.
    """
    arguments = linear_arguments(inputs, weight, outputs, cut, group)
    arguments.overlaps = int(chip_of(outputs.device).major >= 9)
    arguments.bias = bias.data_ptr() if bias is not None else None
    if tickets is not None:
        partial = torch.empty(cut.workspace, device=outputs.device)
        arguments.partial, arguments.tickets = partial.data_ptr(), tickets.data_ptr()
    with torch.cuda.device(outputs.device):
        stream = stream_of(outputs.device)
        kernels.linear(arguments, stream, cut.kernel)


def cut_of(
    tokens: int,
    device: torch.device,
    weight: TiledWeight,
    group: int | None,
    kernel: Kernel | None,
    *,
    shows_sums: bool = False,
) -> Schedule:
    """Return how a call is cut into blocks, and which kernel it uses.

    Args:
        tokens: One or more.
        device: Of the inputs.
        weight: The tiles.
        group: Columns of inputs that share a scale; ``None`` is the whole row.
        kernel: Which to use, if it can; ``None`` chooses by device and size.
        shows_sums: See :func:`sums`.
    """
    chip = chip_of(device)
    sizes = tokens, weight.down, weight.across, chip.processors
    run = 0 if weight.scales.shape[0] == 1 else run_of(weight.group)
    pays = chip.major > 9 or few_pays(tokens, weight.down, chip.processors, run)
    if kernel == "few" or (kernel is None and chip.major >= 9 and pays):
        few = few_schedule(*sizes, run, chip.shared)
        if few is not None and group is None and not shows_sums:
            return few
    if kernel == "portable" or chip.major != 9:
        return schedule(*sizes)
    if shows_sums or group is not None:
        return hopper_schedule(*sizes, "any")
    if weight.scales.shape[0] == 1:
        return hopper_schedule(*sizes, "one")
    return hopper_schedule(*sizes, "groups" if weight.group >= COLUMNS else "any")


def sums(
    kernels: Kernels,
    codes: Tensor,
    weight: TiledWeight,
    run: int,
    *,
    kernel: Kernel | None = None,
) -> Tensor:
    """Return the integers that the linear kernel adds up, for tests.

    Args:
        kernels: Of the device.
        codes: int8 ``[M, 128 ceil(K / 128)]``, M of one or more.
        weight: The tiles.
        run: Columns of a sum: 32, 64 (not on Hopper) or 128; a divisor of the weight's
            group.
        kernel: See :func:`cut_of`.

    Returns:
        int32 ``[M, 128 ceil(K / 128) / run, N]``.
    """
    outputs = torch.empty(len(codes), weight.shape[0], device=codes.device)
    scales = torch.ones(len(codes), 1, device=codes.device)
    found = torch.full(
        (len(codes), weight.across * COLUMNS // run, weight.shape[0]),
        torch.iinfo(torch.int32).min,
        dtype=torch.int32,
        device=codes.device,
    )
    cut = cut_of(len(codes), codes.device, weight, None, kernel, shows_sums=True)
    cut = replace(cut, splits=1)
    arguments = linear_arguments((codes, scales), weight, outputs, cut, None)
    if weight.scales.shape[0] > 1:
        arguments.weight_scale_shift += (arguments.run // run).bit_length() - 1
    arguments.run, arguments.sums = run, found.data_ptr()
    with torch.cuda.device(codes.device):
        stream = stream_of(codes.device)
        kernels.linear(arguments, stream, cut.kernel)
    return found
