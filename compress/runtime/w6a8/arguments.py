"""What the compiled kernels are called with, from tensors of a CUDA device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from compress.runtime.w6a8.abi import DTYPES, LinearArguments, ValuesArguments
from compress.runtime.w6a8.schedule import Schedule
from compress.runtime.w6a8.tiles import TiledWeight, run_of

KINDS = {"plain": 0, "norm": 1, "norm_plus_one": 2, "gated": 3}


@dataclass(frozen=True)
class Values:
    """What is rounded to int8: inputs as they are, normed, or gated.

    Attributes:
        inputs: ``[M, K]``, for ``"gated"`` ``[M, 2 K]``; contiguous; float32, float16
            or bfloat16.
        kind: A key of :data:`KINDS`; formulas are in ``fused.py``.
        norm: The weight of a norm, ``[K]`` of the inputs' type, contiguous.
        epsilon: Of a norm.
    """

    inputs: Tensor
    kind: str = "plain"
    norm: Tensor | None = None
    epsilon: float = 0.0

    @property
    def rows(self) -> int:
        """M."""
        return len(self.inputs)

    @property
    def columns(self) -> int:
        """K."""
        return self.inputs.shape[1] // (2 if self.kind == "gated" else 1)

    def arguments(self) -> ValuesArguments:
        """Return ``struct W6A8Values``."""
        return ValuesArguments(
            inputs=self.inputs.data_ptr(),
            norm=None if self.norm is None else self.norm.data_ptr(),
            epsilon=self.epsilon,
            kind=KINDS[self.kind],
            columns=self.columns,
            dtype=DTYPES[self.inputs.dtype],
        )


@dataclass(frozen=True)
class Chip:
    """What a schedule depends on.

    Attributes:
        major: Of the compute capability.
        processors: Multiprocessors.
        shared: Bytes of shared memory that a block can have.
    """

    major: int
    processors: int
    shared: int


@cache
def chip_of(device: torch.device) -> Chip:
    """Return what is known of a device."""
    found = torch.cuda.get_device_properties(device)
    return Chip(
        found.major,
        found.multi_processor_count,
        found.shared_memory_per_block_optin,  # type: ignore[attr-defined]
    )


def stream_of(device: torch.device) -> int:
    """Return the address of the current stream of a device."""
    return torch.cuda.current_stream(device).cuda_stream


def linear_arguments(
    inputs: tuple[Tensor, Tensor],
    weight: TiledWeight,
    outputs: Tensor,
    cut: Schedule,
    group: int | None,
) -> LinearArguments:
    """Return what a linear kernel is called with, but for bias and workspace.

    Args:
        inputs: Codes and scales: int8 ``[M, 128 ceil(K / 128)]``, float32 ``[M, Ga]``.
        weight: The tiles.
        outputs: ``[M, N]``.
        cut: Into blocks.
        group: Columns of the inputs' scales; ``None`` is the whole row.
    """
    codes, scales = inputs
    columns = weight.shape[1]
    of_weight = weight.group if weight.group < columns else None
    group = group if scales.shape[1] > 1 else None
    run = run_of(of_weight, group)
    if cut.kernel == "hopper" and run == 64:
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
        tiles_of_block=cut.tiles,
        depth=cut.depth,
        device=codes.get_device(),
    )


def _shift(group: int | None, run: int) -> int:
    """Return the exponent of how many runs share a scale; 31 shifts any number away."""
    return 31 if group is None else (group // run).bit_length() - 1
