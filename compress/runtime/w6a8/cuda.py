"""Calls of the kernels on tensors of a CUDA device.

All memory comes from torch's allocator and nothing waits for the device, so calls can
be captured in CUDA graphs.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from compress.runtime.w6a8.abi import (
    DTYPES,
    Kernels,
    LinearArguments,
    QuantizeArguments,
)
from compress.runtime.w6a8.schedule import Schedule, hopper_schedule, schedule
from compress.runtime.w6a8.tiles import COLUMNS, TiledWeight, run_of


def quantize(
    kernels: Kernels, inputs: Tensor, group: int | None, tickets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return codes and scales of inputs; codes are filled up to 128 columns with zeros.

    Args:
        kernels: Of the device.
        inputs: ``[M, K]``, contiguous.
        group: Columns that share a scale; ``None`` is the whole row.
        tickets: int32 that becomes zeros, for a linear layer that follows.

    Returns:
        int8 ``[M, 128 ceil(K / 128)]`` and float32 ``[M, K / group]``.
    """
    rows, columns = inputs.shape
    group = group or columns
    padded = -(-columns // COLUMNS) * COLUMNS
    codes = torch.empty(rows, padded, dtype=torch.int8, device=inputs.device)
    scales = torch.empty(rows, columns // group, device=inputs.device)
    if rows == 0:
        return codes, scales
    arguments = QuantizeArguments(
        inputs=inputs.data_ptr(),
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        tickets=tickets.data_ptr() if tickets is not None else None,
        rows=rows,
        columns=columns,
        padded=padded,
        group=group,
        dtype=DTYPES[inputs.dtype],
        ticket_count=tickets.numel() if tickets is not None else 0,
        device=inputs.get_device(),
        overlaps=int(_chip(inputs.device)[0] >= 9),
    )
    with torch.cuda.device(inputs.device):
        kernels.quantize(arguments, stream_of(inputs.device))
    return codes, scales


def linear(
    kernels: Kernels,
    inputs: Tensor,
    weight: TiledWeight,
    bias: Tensor | None,
    *,
    group: int | None,
    on_hopper: bool | None = None,
) -> Tensor:
    """Return ``inputs @ weight.T + bias`` with inputs rounded to int8.

    Args:
        kernels: Of the device.
        inputs: ``[M, K]``, contiguous, float32, float16 or bfloat16.
        weight: The tiles.
        bias: ``[N]`` of the inputs' type.
        group: Columns of inputs that share a scale; ``None`` is the whole row.
        on_hopper: Whether to use the kernel that only Hopper has; ``None`` asks the
            device.

    Returns:
        ``[M, N]`` of the inputs' type.
    """
    rows = weight.shape[0]
    outputs = torch.empty(len(inputs), rows, dtype=inputs.dtype, device=inputs.device)
    if len(inputs) == 0:
        return outputs
    group = group if group is not None and group < inputs.shape[1] else None
    cut = cut_of(inputs, weight, group, on_hopper)
    tickets = None
    if cut.splits > 1:
        tickets = torch.empty(cut.blocks, dtype=torch.int32, device=inputs.device)
    coded = quantize(kernels, inputs, group, tickets)
    launch(kernels, coded, weight, bias, outputs, cut=cut, group=group, tickets=tickets)
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
    arguments = linear_arguments(*inputs, weight, outputs, cut, group)
    arguments.bias = bias.data_ptr() if bias is not None else None
    if tickets is not None:
        partial = torch.empty(cut.workspace, device=outputs.device)
        arguments.partial, arguments.tickets = partial.data_ptr(), tickets.data_ptr()
    with torch.cuda.device(outputs.device):
        stream = stream_of(outputs.device)
        kernels.linear(arguments, stream, on_hopper=cut.on_hopper)


@cache
def _chip(device: torch.device) -> tuple[int, int]:
    """Return the major compute capability and the number of multiprocessors."""
    found = torch.cuda.get_device_properties(device)
    return found.major, found.multi_processor_count


def stream_of(device: torch.device) -> int:
    """Return the address of the current stream of a device."""
    return torch.cuda.current_stream(device).cuda_stream


def cut_of(
    inputs: Tensor,
    weight: TiledWeight,
    group: int | None,
    on_hopper: bool | None,
    *,
    shows_sums: bool = False,
) -> Schedule:
    """Return how a call is cut into blocks, and which kernel it uses.

    Args:
        inputs: ``[M, K]`` or their codes.
        weight: The tiles.
        group: Columns of inputs that share a scale; ``None`` is the whole row.
        on_hopper: See :func:`linear`.
        shows_sums: See :func:`sums`.
    """
    major, processors = _chip(inputs.device)
    sizes = len(inputs), weight.down, weight.across, processors
    if not (major == 9 if on_hopper is None else on_hopper):
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
    on_hopper: bool | None = None,
) -> Tensor:
    """Return the integers that the linear kernel adds up, for tests.

    Args:
        kernels: Of the device.
        codes: int8 ``[M, 128 ceil(K / 128)]``, M of one or more.
        weight: The tiles.
        run: Columns of a sum: 32, 64 (not on Hopper) or 128; a divisor of the weight's
            group.
        on_hopper: See :func:`linear`.

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
    cut = cut_of(codes, weight, None, on_hopper, shows_sums=True)
    cut = replace(cut, splits=1)
    arguments = linear_arguments(codes, scales, weight, outputs, cut, None)
    if weight.scales.shape[0] > 1:
        arguments.weight_scale_shift += (arguments.run // run).bit_length() - 1
    arguments.run, arguments.sums = run, found.data_ptr()
    with torch.cuda.device(codes.device):
        stream = stream_of(codes.device)
        kernels.linear(arguments, stream, on_hopper=cut.on_hopper)
    return found


def linear_arguments(
    codes: Tensor,
    scales: Tensor,
    weight: TiledWeight,
    outputs: Tensor,
    cut: Schedule,
    group: int | None,
) -> LinearArguments:
    """Return what the linear kernel is called with, but for bias and workspace.

    Args:
        codes: int8 ``[M, 128 ceil(K / 128)]``.
        scales: float32 ``[M, Ga]``.
        weight: The tiles.
        outputs: ``[M, N]``.
        cut: Into blocks.
        group: Columns of ``scales``; ``None`` is the whole row.
    """
    columns = weight.shape[1]
    of_weight = weight.group if weight.group < columns else None
    group = group if scales.shape[1] > 1 else None
    run = run_of(of_weight, group)
    if cut.on_hopper and run == 64:
        run = 32  # no kernel for 64
    return LinearArguments(
        inputs=codes.data_ptr(),
        input_scales=scales.data_ptr(),
        tiles=weight.tiles.data_ptr(),
        weight_scales=weight.scales.data_ptr(),
        outputs=outputs.data_ptr(),
        tokens=len(codes),
        rows=weight.shape[0],
        down=weight.down,
        across=weight.across,
        run=run,
        weight_groups=weight.scales.shape[0],
        weight_scale_shift=_shift(of_weight, run),
        input_groups=scales.shape[1],
        input_scale_shift=_shift(group, run),
        scale_dtype=DTYPES[weight.scales.dtype],
        output_dtype=DTYPES[outputs.dtype],
        token_tile=cut.token_tile,
        splits=cut.splits,
        panels=cut.panels,
        at_once=cut.at_once,
        device=codes.get_device(),
    )


def _shift(group: int | None, run: int) -> int:
    """Return the exponent of how many runs share a scale; 31 shifts any number away."""
    return 31 if group is None else (group // run).bit_length() - 1
