"""What the compiled kernels are called with, from tensors of a CUDA device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from compress.runtime.w6a8.abi import DTYPES, LinearArguments, ValuesArguments
from compress.runtime.w6a8.schedule import Schedule
from compress.runtime.w6a8.tiles import TiledWeight, run_of

Kernel = Literal["few", "hopper", "portable"]
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

    @property
    def is_aligned(self) -> bool:
        """Whether eight 16-bit values can be loaded at once, everywhere."""
        norm = 0 if self.norm is None else self.norm.data_ptr()
        return self.columns % 8 == 0 and (self.inputs.data_ptr() | norm) % 16 == 0

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


@cache
def chip_of(device: torch.device) -> tuple[int, int]:
    """Return the major compute capability and the number of multiprocessors."""
    found = torch.cuda.get_device_properties(device)
    return found.major, found.multi_processor_count


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
    group = group if scales.shape[1] > 1 else None
    found = layer_arguments(weight, outputs, group)
    if cut.on_hopper and found.run == 64:  # no kernel for 64
        found.run, found.weight_scale_shift = 32, _shift(_group_of(weight), 32)
        found.input_scale_shift = _shift(group, 32)
    found.inputs, found.input_scales = codes.data_ptr(), scales.data_ptr()
    found.input_groups = scales.shape[1]
    found.token_tile, found.splits = cut.token_tile, cut.splits
    found.panels, found.at_once, found.near = cut.panels, cut.at_once, cut.near
    return found


def layer_arguments(
    weight: TiledWeight, outputs: Tensor, group: int | None
) -> LinearArguments:
    """Return what follows from a layer alone; inputs have one scale for each token.

    Args:
        weight: The tiles.
        outputs: ``[M, N]``.
        group: Columns of the inputs' scales; ``None`` is the whole row.
    """
    run = run_of(_group_of(weight), group)
    return LinearArguments(
        tiles=weight.tiles.data_ptr(),
        weight_scales=weight.scales.data_ptr(),
        outputs=outputs.data_ptr(),
        tokens=len(outputs),
        rows=weight.shape[0],
        down=weight.down,
        across=weight.across,
        run=run,
        weight_groups=weight.scales.shape[0],
        weight_scale_shift=_shift(_group_of(weight), run),
        input_groups=1,
        input_scale_shift=_shift(group, run),
        scale_dtype=DTYPES[weight.scales.dtype],
        output_dtype=DTYPES[outputs.dtype],
        device=outputs.get_device(),
    )


def _group_of(weight: TiledWeight) -> int | None:
    return weight.group if weight.group < weight.shape[1] else None


def _shift(group: int | None, run: int) -> int:
    """Return the exponent of how many runs share a scale; 31 shifts any number away."""
    return 31 if group is None else (group // run).bit_length() - 1
