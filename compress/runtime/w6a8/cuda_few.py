"""Calls of the kernel for few tokens, which may round its inputs itself."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.runtime.w6a8.abi import FewArguments, Kernels
from compress.runtime.w6a8.arguments import (
    Kernel,
    Values,
    chip_of,
    layer_arguments,
    stream_of,
)
from compress.runtime.w6a8.schedule import FewSchedule, few_schedule
from compress.runtime.w6a8.tiles import TiledWeight, run_of


def cut_of(
    device: torch.device,
    tokens: int,
    weight: TiledWeight,
    group: int | None,
    kernel: Kernel | None,
) -> FewSchedule | None:
    """Return how a call is cut into blocks; ``None`` if another kernel is to do it.

    Args:
        device: Of the inputs.
        tokens: One or more.
        weight: The tiles.
        group: Columns of inputs that share a scale; ``None`` is the whole row.
        kernel: Which to use; ``None`` chooses by device and size.
    """
    major, processors = chip_of(device)
    if kernel not in (None, "few") or major < 9 or group is not None:
        return None
    run = 0 if weight.scales.shape[0] == 1 else run_of(weight.group, None)
    return few_schedule(tokens, weight.down, weight.across, run, processors)


def rounds(values: Values) -> bool:
    """Whether the kernel rounds these values itself, in every block.

    Args:
        values: ``[M, K]``.
    """
    slots = values.rows * -(-values.columns // FewSchedule.SLOT)
    return (
        slots <= FewSchedule.SLOTS
        and values.is_aligned
        and values.inputs.dtype != torch.float32
    )


def launch(
    kernels: Kernels,
    given: Values | tuple[Tensor, Tensor],
    weight: TiledWeight,
    bias: Tensor | None,
    outputs: Tensor,
    cut: FewSchedule,
) -> None:
    """Start the product of up to 16 tokens.

    Args:
        kernels: Of the device.
        given: Values for which :func:`rounds` holds; or codes ``[M, 128 ceil(K /
            128)]`` and scales ``[M, 1]``.
        weight: The tiles.
        bias: ``[N]`` of the outputs' type.
        outputs: ``[M, N]``, written.
        cut: See :func:`cut_of`.
    """
    layer = layer_arguments(weight, outputs, None)
    layer.splits, layer.at_once = 1, cut.at_once
    layer.bias = None if bias is None else bias.data_ptr()
    arguments = FewArguments(
        tiles=cut.tiles,
        depth=cut.depth,
        near=cut.near,
        overlaps=int(chip_of(outputs.device)[0] >= 9),
    )
    if isinstance(given, Values):
        arguments.values = given.arguments()
    else:
        layer.inputs, layer.input_scales = (tensor.data_ptr() for tensor in given)
    arguments.linear = layer
    with torch.cuda.device(outputs.device):
        kernels.few(arguments, stream_of(outputs.device))
