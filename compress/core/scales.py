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

import math

import torch
from torch import Tensor

from compress.core import super_scales
from compress.core.scheme import IQ4, Scales, Scheme, Zero

TORCH_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
_E8M0_BIAS = 127
_MOST_SHIFT = 15
_E4M3_MOST = 448.0
_E4M3_LEAST = 2.0**-9
_MOST_MULTIPLIER = 1e36  # of two-level scales; keeps scales of tiny matrices normal
_STEPS_OF_AN_OCTAVE = 8

# compressed-tensors rounds to the mantissa of E2M1, except for E2M3.
_ROUNDS_UP = {"e2m3": 1.9375}

ROUNDINGS = {"nearest": torch.round, "ceil": torch.ceil, "floor": torch.floor}


def outer_scale(largest: Tensor, scheme: Scheme) -> Tensor | None:
    """Return what the scales of a matrix have in common, or ``None``.

    Args:
        largest: float32 ``[R, G]``, the largest magnitude of each group.
        scheme: How scales are stored.

    Returns:
        float32: ``[1, 1]``, the multiplier ``G`` of two-level scales; or ``[R, 1]``,
        the largest scale of each row, of ratio scales.
    """
    reach = scheme.levels.reach
    if scheme.scales is Scales.TWO_LEVEL:
        most = largest.amax()
        multiplier = _E4M3_MOST * reach / torch.where(most == 0, _E4M3_MOST, most)
        return multiplier.clamp(max=_MOST_MULTIPLIER).view(1, 1)
    if scheme.scales is Scales.RATIO:
        return _stored_row(largest.amax(1, keepdim=True) / reach, scheme)
    return None


def outer_candidates(outer: Tensor | None, scheme: Scheme) -> tuple[Tensor | None, ...]:
    """Return outer scales that a search should try, the given one first.

    Shifts reach every power of two of a row's scale, so the candidates of ratio scales
    fill one octave. The multiplier of two-level scales is kept: E4M3 has the same
    relative spacing everywhere.
    """
    if scheme.scales is not Scales.RATIO or outer is None:
        return (outer,)
    steps = range(1, _STEPS_OF_AN_OCTAVE)
    wider = (_stored_row(outer * 2 ** (i / _STEPS_OF_AN_OCTAVE), scheme) for i in steps)
    return (outer, *wider)


def _stored_row(values: Tensor, scheme: Scheme) -> Tensor:
    return values.to(TORCH_DTYPES[scheme.scale_dtype]).float()


def microscaling(largest: Tensor, scheme: Scheme) -> Tensor:
    """Return the powers of two that a microscaling format takes for groups.

    The exponent is that of the largest magnitude less that of the grid's largest
    level (OCP), one more where the magnitude's mantissa would round up to the next
    power of two. compressed-tensors does the same.

    Args:
        largest: float32 ``[R, G]``, the largest magnitude of each group.
        scheme: Of the grid.

    Returns:
        float32, as ``largest``; 0 where that is.
    """
    mantissa, exponent = torch.frexp(largest)
    rounds_up = 2 * mantissa >= _ROUNDS_UP.get(scheme.grid, 1.75)
    _, of_grid = math.frexp(scheme.levels.reach)
    power = torch.exp2((exponent + rounds_up.int() - of_grid).float())
    return torch.where(largest == 0, torch.zeros_like(power), power)


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
    if scheme.scales is Scales.SUPER:
        assert outer is not None
        step, _ = super_scales.parts_of(outer, scheme)
        codes = super_scales.codes_of(values, step, scheme)
        return codes * super_scales.spread(step, scheme)
    wanted = values.clamp(min=2.0**-126)
    if scheme.scales is Scales.POWER:
        exponent = ROUNDINGS[rounding](torch.log2(wanted))
        stored = torch.exp2(exponent.clamp(-126, 127))
    else:
        assert outer is not None
        # Rounded as the row's scale was, or the largest group would miss a shift of 0.
        ratio = outer.clamp(min=2.0**-126) / _stored_row(wanted, scheme)
        # The paper's "ceil" is of the shift, which makes scales smaller.
        shift = ROUNDINGS[rounding](torch.log2(ratio))
        stored = outer * torch.exp2(-shift.clamp(0, _MOST_SHIFT))
    return torch.where(values == 0, torch.zeros_like(stored), stored)


def smallest_scale(scheme: Scheme, outer: Tensor | None) -> Tensor | float:
    """Return the scale that a group of zeros gets: any will do, it must be storable."""
    if scheme.scales is Scales.SUPER or scheme.grid == IQ4:  # which has no level 0
        return super_scales.EMPTY_SCALE
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
        (``POWER``), uint8 shifts (``RATIO``), float8 E4M3 (``TWO_LEVEL``) or int8
        (``SUPER``); and ``None``, ``[R, 1]`` in the storage type, float32 ``[1]``, or
        float16 as in ``core/super_scales.py``.
    """
    scale = scale[:: scheme.rows_of_scale(scale.shape[0])]
    if scheme.scales is Scales.FREE:
        return scale.to(TORCH_DTYPES[scheme.scale_dtype]).contiguous(), None
    if scheme.scales is Scales.POWER:
        exponent = torch.log2(scale).round() + _E8M0_BIAS
        return exponent.to(torch.uint8).contiguous(), None
    assert outer is not None
    if scheme.scales is Scales.SUPER:
        step, _ = super_scales.parts_of(outer, scheme)
        codes = super_scales.codes_of(scale, step, scheme)
        return codes.to(torch.int8), outer.half().contiguous()
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
        if scheme.scales is Scales.SUPER:
            step, _ = super_scales.parts_of(outer, scheme)
            values = scale.float() * super_scales.spread(step, scheme)
        elif scheme.scales is Scales.TWO_LEVEL:
            values = scale.float() / outer.float()
        else:
            values = outer.float() * torch.exp2(-scale.float())
    if scheme.row_block == 1:
        return values
    repeats = scheme.rows_of_scale(rows)
    return values.repeat_interleave(repeats, 0)[:rows]


def zeros_to_stored(
    zero: Tensor | None, scheme: Scheme, outer: Tensor | None
) -> Tensor | None:
    """Return stored zero points: int8, or float minima in the storage type.

    Args:
        zero: float32 ``[R, G]``, holding numbers that can be stored.
        scheme: How they are stored.
        outer: Of the scales.
    """
    if zero is None:
        return None
    if scheme.scales is Scales.SUPER:
        assert outer is not None
        _, step = super_scales.parts_of(outer, scheme)
        assert step is not None
        return super_scales.codes_of(-zero, step, scheme).to(torch.int8)
    whole = scheme.zero is Zero.INTEGER
    return zero.to(torch.int8 if whole else TORCH_DTYPES[scheme.scale_dtype])


def zeros_from_stored(
    zero: Tensor | None, scheme: Scheme, outer: Tensor | None
) -> Tensor | None:
    """Return the float32 zero points ``[R, G]`` that a loader computes."""
    if zero is None or scheme.scales is not Scales.SUPER:
        return None if zero is None else zero.float()
    assert outer is not None
    _, step = super_scales.parts_of(outer, scheme)
    assert step is not None
    return -(zero.float() * super_scales.spread(step, scheme))


SEARCH_FACTORS = tuple(0.55 + 0.025 * i for i in range(25))
_EXPONENT_FACTORS = (0.5, 1.0, 2.0)
# Above 1.5 the largest weight of FP4 maps to 4, where the grid is finer.
_FLOAT_FACTORS = tuple(0.6 + 0.04 * i for i in range(26))


def search_factors(scheme: Scheme) -> tuple[float, ...]:
    """Return the multiples of the full range that a search tries."""
    if scheme.scales in (Scales.POWER, Scales.RATIO):
        return _EXPONENT_FACTORS
    if not scheme.is_integer:
        return _FLOAT_FACTORS
    if scheme.zero is Zero.NONE:
        return (*SEARCH_FACTORS, *(-factor for factor in SEARCH_FACTORS))
    return SEARCH_FACTORS
