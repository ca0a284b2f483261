"""Rounding of a layer's inputs at run time, simulated: the same numbers in float32.

A runtime with low-precision products makes a scale for each token, or for each token
and group of columns, as it goes. With ``m`` the largest level of the grid and
``amax = max |x|`` over the token or group,

    inv = m / amax,  code = clamp(round(x inv), -m, m),  scale = amax / m,

in float32, ties to even. The grid is symmetric: ``-2^(b-1)`` is never used, so that a
sum of products is bounded alike on both sides. A run of zeros, or of numbers too small
for float32's normal range, becomes zeros; one with a NaN or an infinity becomes NaN.

Two-level inputs (NVFP4) have E4M3 scales under one static float32 multiplier ``G``,
``2688 / amax`` of calibration: ``scale = e4m3(G amax_group / 6) / G``.

Source: the integer form is that of FlexQ (arXiv 2508.04405) with 127 levels in place of
its 31 for 8 bits; E4M3 over 448 is what vLLM's dynamic FP8 does; NVFP4 as in
compressed-tensors 0.20. Differs: compressed-tensors divides integers by 127.5 and uses
-128 as well, so its outputs differ from these by rounding noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.core.errors import SchemeError
from compress.core.levels import FLOAT_GRIDS
from compress.core.scheme import FLOAT_FORMATS, InputScheme

_LEAST_NORMAL = 2.0**-126
_E4M3 = FLOAT_GRIDS["e4m3"]
NVFP4_RANGE = FLOAT_FORMATS["e4m3"].highest * FLOAT_FORMATS["e2m1"].highest
"""What the largest input of calibration is mapped to: 448 steps of scale times 6."""


def largest_level(scheme: InputScheme) -> float:
    """Return the level that the largest magnitude of a token or group becomes."""
    if scheme.grid in FLOAT_FORMATS:
        return FLOAT_FORMATS[scheme.grid].highest
    return float((1 << (scheme.bits - 1)) - 1)


def quantize_inputs(
    inputs: Tensor, scheme: InputScheme, *, amax: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return levels and scales of inputs.

    Args:
        inputs: ``[..., C]``, any float type; what it is rounded to counts.
        scheme: Grid and group; the group must divide ``C``.
        amax: Largest magnitude in calibration, for two-level schemes only.

    Returns:
        float32 levels ``[..., G, C / G]`` and float32 scales ``[..., G, 1]``; their
        product is what the layer computes with.

    Raises:
        SchemeError: The group does not divide ``C``, or a two-level scheme has no
            ``amax``.
    """
    columns = inputs.shape[-1]
    group = scheme.group_size or columns
    if columns % group:
        raise SchemeError(
            f"groups of {group} inputs do not divide {columns} columns; use one scale "
            "a token, or a group size that divides them"
        )
    x = inputs.float().reshape(*inputs.shape[:-1], columns // group, group)
    most = x.abs().amax(-1, keepdim=True)  # NaN where a NaN is
    if scheme.two_level:
        scale = _two_level(most, scheme, amax)
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
    else:
        # Two tensors: with a Python number torch multiplies by a rounded inverse.
        level = torch.full_like(most, largest_level(scheme))
        usable = most >= _LEAST_NORMAL
        scale = torch.where(usable, most / level, 0.0)
        inverse = torch.where(usable, level / most, 0.0)
    bad = ~torch.isfinite(most)
    levels = _round(torch.where(bad, 0.0, x) * inverse, scheme)
    return levels, torch.where(bad, torch.nan, scale)


def fake_quantize_inputs(
    inputs: Tensor, scheme: InputScheme, *, amax: float | None = None
) -> Tensor:
    """Return what a layer computes with in place of ``inputs``, in their type.

    Arguments and errors are those of :func:`quantize_inputs`.
    """
    levels, scale = quantize_inputs(inputs, scheme, amax=amax)
    return (levels * scale).flatten(-2).to(inputs.dtype)


def _two_level(most: Tensor, scheme: InputScheme, amax: float | None) -> Tensor:
    """Return the scales of groups: E4M3 numbers over the static multiplier."""
    if amax is None or not amax > 0:
        raise SchemeError(
            f"{scheme.grid} inputs with two levels of scales need the largest input of "
            "calibration, and none was measured for this layer"
        )
    outer = NVFP4_RANGE / amax
    steps = _E4M3.round_(torch.nan_to_num(most, 0.0, 0.0) * (outer / 6))
    return steps / outer


def _round(values: Tensor, scheme: InputScheme) -> Tensor:
    if scheme.grid in FLOAT_FORMATS:
        return FLOAT_GRIDS[scheme.grid].round_(values)
    level = largest_level(scheme)
    return values.round_().clamp_(-level, level)
