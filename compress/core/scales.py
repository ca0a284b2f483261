"""How scales are stored: rounding to storage, and the numbers that loaders compute.

Arithmetic always sees the float32 scale that a loader of the file will see. This module
turns wanted scales into such numbers, and these into stored tensors and back, for each
kind of :class:`~compress.core.scheme.Scales`.

Source: OCP Microscaling Formats v1.0 for E8M0; compressed-tensors 0.20 for NVFP4, where
the outer scale is stored as the multiplier ``G`` that was used for quantizing; Wu et
al. (2023), "ZeroQuant-FP", for scales that are powers of two (M1) and power-of-two
ratios within a row (M2). Differs from ZeroQuant-FP: exponents are rounded to nearest by
default and searched by error, not rounded up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.core.scheme import Scales, Scheme

TORCH_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
_E8M0_BIAS = 127
_MOST_SHIFT = 15
_E4M3_MOST = 448.0
_E4M3_LEAST = 2.0**-9

ROUNDINGS = {"nearest": torch.round, "ceil": torch.ceil, "floor": torch.floor}


def outer_scale(scale: Tensor, scheme: Scheme) -> Tensor | None:
    """Return what the scales of a matrix have in common, or ``None``.

    Args:
        scale: float32 ``[R, G]``, the wanted scales.
        scheme: How they are stored.

    Returns:
        float32: ``[1, 1]``, the multiplier ``G`` of two-level scales; or ``[R, 1]``,
        the largest scale of each row, of ratio scales.
    """
    if scheme.scales is Scales.TWO_LEVEL:
        largest = scale.amax().clamp(min=1e-30)
        return (_E4M3_MOST / largest).view(1, 1)
    if scheme.scales is Scales.RATIO:
        rows = scale.amax(1, keepdim=True)
        return rows.to(TORCH_DTYPES[scheme.scale_dtype]).float()
    return None


def round_to_storage(
    values: Tensor,
    scheme: Scheme,
    outer: Tensor | None = None,
    *,
    rounding: str = "nearest",
) -> Tensor:
    """Round float32 scales to numbers that can be stored; 0 where none is small enough.

    Args:
        values: ``[R, G]``; negative only where scales are ``FREE``.
        scheme: How they are stored.
        outer: Of :func:`outer_scale`.
        rounding: Of exponents: ``nearest`` (in the logarithm), ``ceil`` or ``floor``.
    """
    if scheme.scales is Scales.FREE:
        return values.to(TORCH_DTYPES[scheme.scale_dtype]).float()
    if scheme.scales is Scales.TWO_LEVEL:
        assert outer is not None
        steps = (values * outer).clamp(max=_E4M3_MOST).to(torch.float8_e4m3fn)
        return steps.float() / outer
    wanted = values.clamp(min=2.0**-126)
    if scheme.scales is Scales.POWER:
        exponent = ROUNDINGS[rounding](torch.log2(wanted))
        stored = torch.exp2(exponent.clamp(-126, 127))
    else:
        assert outer is not None
        # The paper's "ceil" is of the shift, which makes scales smaller.
        shift = ROUNDINGS[rounding](torch.log2(outer.clamp(min=2.0**-126) / wanted))
        stored = outer * torch.exp2(-shift.clamp(0, _MOST_SHIFT))
    return torch.where(values == 0, torch.zeros_like(stored), stored)


def smallest_scale(scheme: Scheme, outer: Tensor | None) -> Tensor | float:
    """Return the scale that a group of zeros gets: any will do, it must be storable."""
    if scheme.scales is Scales.TWO_LEVEL:
        assert outer is not None
        return _E4M3_LEAST / outer
    if scheme.scales is Scales.RATIO:
        assert outer is not None
        return torch.where(outer == 0, 1.0, outer)
    return 1.0


def to_stored(
    scale: Tensor, scheme: Scheme, outer: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the stored scales, and the stored outer scale.

    Args:
        scale: float32 ``[R, G]`` of :func:`round_to_storage`.
        scheme: How they are stored.
        outer: Of :func:`outer_scale`.

    Returns:
        ``[ceil(R / rows), G]``: of the storage type (``FREE``), uint8 exponents
        (``POWER``), uint8 shifts (``RATIO``) or float8 E4M3 (``TWO_LEVEL``); and
        ``None``, ``[R, 1]`` in the storage type, or float32 ``[1]``.
    """
    scale = scale[:: scheme.rows_of_scale(scale.shape[0])]
    if scheme.scales is Scales.FREE:
        return scale.to(TORCH_DTYPES[scheme.scale_dtype]).contiguous(), None
    if scheme.scales is Scales.POWER:
        exponent = torch.log2(scale).round() + _E8M0_BIAS
        return exponent.to(torch.uint8).contiguous(), None
    assert outer is not None
    if scheme.scales is Scales.TWO_LEVEL:
        steps = (scale * outer).to(torch.float8_e4m3fn)
        return steps.contiguous(), outer.reshape(1).contiguous()
    safe = torch.where(outer == 0, torch.ones_like(outer), outer)
    shift = torch.log2(safe / scale).round()
    return (
        shift.to(torch.uint8).contiguous(),
        safe.to(TORCH_DTYPES[scheme.scale_dtype]).contiguous(),
    )


def from_stored(
    scale: Tensor, scheme: Scheme, outer: Tensor | None, *, rows: int
) -> Tensor:
    """Return the float32 scales ``[R, G]`` that a loader computes."""
    if scheme.scales is Scales.FREE:
        values = scale.float()
    elif scheme.scales is Scales.POWER:
        values = torch.exp2(scale.float() - _E8M0_BIAS)
    else:
        assert outer is not None
        if scheme.scales is Scales.TWO_LEVEL:
            values = scale.float() / outer.float()
        else:
            values = outer.float() * torch.exp2(-scale.float())
    if scheme.row_block == 1:
        return values
    repeats = scheme.rows_of_scale(rows)
    return values.repeat_interleave(repeats, 0)[:rows]
